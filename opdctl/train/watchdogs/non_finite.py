"""A loss or a gradient that is not finite. The update skips its step; this counts and stops.

The weights and the moments stay as they were, so one bad batch costs one step. Several in a row
mean that the weights themselves are bad, and no later step can mend them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opdctl.config.schema import key
from opdctl.config.settings import WatchdogConfig
from opdctl.protocols import Watchdog


class NonFinite(Watchdog):
    """Optimizer steps skipped because a loss or a gradient is not finite."""

    revision = 1
    at_once = True  # it speaks at the first, and waits for more only before it stops
    hint = "lower optim.lr, or look at the rollouts"

    @dataclass(kw_only=True)
    class Config(WatchdogConfig):
        """The keys of non_finite."""

        steps: int = key(3, "steps in a row before it stops", role="operational", least=1)
        action: Literal["warn", "stop"] = key(
            "stop", "stop as failed, or go on skipping", role="operational"
        )

    def __init__(self, config) -> None:
        self.config = config

    def look(self, values: dict, first: dict) -> dict[str, str]:
        """Read ``skipped``."""
        if not values.get("skipped"):
            return {}
        numbers = f"loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}"
        return {"": f"{numbers}: the weights were left as they were"}
