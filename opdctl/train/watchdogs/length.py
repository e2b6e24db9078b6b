"""Responses shrink to nothing, or hardly one comes to its end.

A length is compared with the one the stage began with: an answer may be one token by nature. Where
a controller moves the limit, a response cannot be longer than the limit of its step, and is cut by
intent as long as that is below the largest.
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.config.settings import WatchdogConfig
from opdctl.protocols import Watchdog


class Length(Watchdog):
    """Responses that collapse, or are cut at the limit."""

    revision = 1
    at_once = False
    hint = "look at the rollouts, and at sampling.max_tokens"

    @dataclass(kw_only=True)
    class Config(WatchdogConfig):
        """The keys of length."""

        steps: int = key(10, "steps in a row before it acts", role="operational", least=1)
        least: float = key(
            0.25, "smallest share of the first step's mean length", role="operational", least=0
        )
        cut: float = key(
            0.75, "largest share of responses cut at the limit", role="operational", least=0
        )

    def __init__(self, config) -> None:
        self.config = config

    def look(self, values: dict, first: dict) -> dict[str, str]:
        """Read ``length`` and ``truncated``."""
        if "length" not in values:
            return {}
        limit = values.get("length_limit", first["length"])
        warnings, start = {}, min(first["length"], limit)
        share = values["length"] / start
        if share < self.config.least:
            warnings["collapse"] = (
                f"{values['length']:.4g} tokens a response, {share:.3f} of the first step's "
                f"{start:.4g}, below {self.config.least:g}"
            )
        widens = limit < values.get("length_most", limit)
        if values["truncated"] > self.config.cut and not widens:
            warnings["limit"] = (
                f"{values['truncated']:.3f} of the responses cut at the limit, "
                f"above {self.config.cut:g}"
            )
        return warnings
