"""Outcome advantage: one number per response, the same for all its tokens.

GRPO (arXiv 2402.03300): A_i = (R_i - mean of the group) / std of the group. Without the division
it is Dr. GRPO's (arXiv 2503.20783). A group whose rewards are all equal has no advantage.
With a length penalty a response costs k x tokens / longest one allowed, which is how one task
becomes several efforts (DeepSeek-V4.1, arXiv 2609.19969: -k(effort) x tokens / L).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opdctl.config.schema import key
from opdctl.config.settings import SignalConfig
from opdctl.protocols import Signal


class Outcome(Signal):
    """The reward of the whole response, compared with its group."""

    revision = 1
    needs = ("reward", "group")

    @dataclass(kw_only=True)
    class Config(SignalConfig):
        """The keys of outcome."""

        reward: str = key(
            "verifier", "verifier, or the orm stage whose score it is: stage:NAME", ref=True
        )
        baseline: Literal["group", "none"] = key("group", "group: minus the mean of the group")
        length_penalty: float = key(
            0.0, "k: cost in reward of a response of max_tokens", least=0.0, neutral=True
        )
        scale_std: bool = key(True, "divide by the standard deviation of the group")

    def __init__(self, config, ctx) -> None:
        self.config = config
        self.per_token = 0.0
        if config.length_penalty:
            self.per_token = config.length_penalty / ctx.config.sampling.max_tokens

    def credit(self, step):
        """Return the credit of each token. Shape [N]."""
        groups: dict[int, list] = {}
        for rollout in step.rollouts:
            groups.setdefault(rollout.group, []).append(rollout)
        return step.spread([self._advantage(r, groups[r.group]) for r in step.rollouts])

    def _advantage(self, rollout, group: list) -> float:
        advantage = self._net(rollout)
        if self.config.baseline == "group":
            advantage -= sum(map(self._net, group)) / len(group)
        if self.config.scale_std:
            # of the reward alone: where all are equal a penalty keeps its size
            centre = sum(r.reward for r in group) / len(group)
            std = (sum((r.reward - centre) ** 2 for r in group) / len(group)) ** 0.5
            if std >= 1e-6:
                advantage /= std
        return advantage

    def _net(self, rollout) -> float:
        return rollout.reward - self.per_token * rollout.length
