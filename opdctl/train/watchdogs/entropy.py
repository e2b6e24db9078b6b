"""The student samples one response only: its entropy has collapsed and it explores nothing.

Reads ``sampled_nll``, the mean of -log p over the tokens that were sampled, which estimates the
entropy of the distribution sampled from without bias and costs no pass. The tiny recipes come down
to .005 nats a token with answers that are right, so the threshold is far below that.
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.config.settings import WatchdogConfig
from opdctl.protocols import Watchdog


class Entropy(Watchdog):
    """The student's own samples are all but certain to it: its entropy has collapsed."""

    revision = 1
    at_once = False
    hint = "stop earlier, or lower optim.lr"

    @dataclass(kw_only=True)
    class Config(WatchdogConfig):
        """The keys of entropy."""

        steps: int = key(10, "steps in a row before it acts", role="operational", least=1)
        least: float = key(
            1e-3, "smallest mean of -log p of its samples, nats a token", role="operational"
        )

    def __init__(self, config) -> None:
        self.config = config

    def look(self, values: dict, first: dict) -> dict[str, str]:
        """Read ``sampled_nll``, which a stage logs whose student samples."""
        least = self.config.least
        value = values.get("sampled_nll", least)
        text = f"sampled_nll {value:.3g} nats a token, below {least:g}"
        return {"": text} if value < least else {}
