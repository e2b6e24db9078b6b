"""Steps that train on nothing: no rollouts, every token masked, every gate shut."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.config.settings import WatchdogConfig
from opdctl.protocols import Watchdog


class Empty(Watchdog):
    """No rollouts in a step, or none whose tokens may train."""

    revision = 1
    at_once = False
    hint = "look at what the source refuses, and at the bounds of weights"

    @dataclass(kw_only=True)
    class Config(WatchdogConfig):
        """The keys of empty."""

        steps: int = key(3, "steps in a row before it acts", role="operational", least=1)

    def __init__(self, config) -> None:
        self.config = config

    def look(self, values: dict, first: dict) -> dict[str, str]:
        """Read ``tokens``, ``masked`` and ``gate_open``."""
        if not values["tokens"]:
            return {"": f"{values['rollouts']} rollouts with 0 tokens"}
        if values.get("masked") == 1.0:
            return {"": f"all {values['tokens']} tokens are masked"}
        if values.get("gate_open") == 0.0:
            return {"": f"none of {values['tokens']} tokens passes its gate"}
        return {}
