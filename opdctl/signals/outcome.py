"""Outcome advantage: one number per response, the same for all its tokens.

GRPO (arXiv 2402.03300): A_i = (R_i - mean of the group) / std of the group. Without the division
it is Dr. GRPO's (arXiv 2503.20783). A group whose rewards are all equal has no advantage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opdctl.schema import key
from opdctl.settings import SignalConfig


class Outcome:
    """The reward of the whole response, compared with its group."""

    revision = 1
    needs = ("reward", "group")

    @dataclass(kw_only=True)
    class Config(SignalConfig):
        """Keys of outcome."""

        reward: str = key(
            "verifier", "verifier, or the orm stage whose score it is: stage:NAME", ref=True
        )
        baseline: Literal["group", "none"] = key("group", "group: minus the mean of the group")
        scale_std: bool = key(True, "divide by the standard deviation of the group")

    def __init__(self, config, ctx) -> None:
        self.config = config

    def credit(self, step):
        """Shape [N]."""
        groups: dict[int, list[float]] = {}
        for rollout in step.rollouts:
            groups.setdefault(rollout.group, []).append(rollout.reward)
        return step.spread([self._advantage(r.reward, groups[r.group]) for r in step.rollouts])

    def _advantage(self, reward: float, group: list[float]) -> float:
        mean = sum(group) / len(group) if self.config.baseline == "group" else 0.0
        advantage = reward - mean
        if self.config.scale_std:
            centre = sum(group) / len(group)
            std = (sum((r - centre) ** 2 for r in group) / len(group)) ** 0.5
            if std < 1e-6:
                return 0.0 if self.config.baseline == "group" else advantage
            advantage /= std
        return advantage
