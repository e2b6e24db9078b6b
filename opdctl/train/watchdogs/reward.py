"""Every reward of a domain is 0, or every one is 1: there is nothing to tell apart.

A group of equal rewards has no advantage. Short streaks are normal for a task that is nearly
learnt, so it waits.
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.config.settings import WatchdogConfig
from opdctl.protocols import Watchdog


class Reward(Watchdog):
    """All rewards of a domain 0, or all 1."""

    revision = 1
    at_once = False
    hint = "harder or easier prompts, or look at how the verifier reads the rollouts"

    @dataclass(kw_only=True)
    class Config(WatchdogConfig):
        """The keys of reward."""

        steps: int = key(10, "steps in a row before it acts", role="operational", least=1)

    def __init__(self, config) -> None:
        self.config = config

    def look(self, values: dict, first: dict) -> dict[str, str]:
        """Read ``reward_by_domain``, which a stage logs that rewards its rollouts."""
        means = values.get("reward_by_domain", {})
        return {d: f"every reward is {v:g}" for d, v in means.items() if v in (0.0, 1.0)}
