"""One path of outcome-routed learning: its rollouts, weighted by perplexity in their group.

SCOPE (arXiv 2604.10688): right rollouts are imitated (nll), weight proportional to PPL_S^(1/tau):
the student's surprising successes count more; wrong ones are distilled, weight PPL_T^(-1/tau): the
teacher's confident corrections count more. A softmax over the rollouts of one prompt that are on
the path, times their number, so that the mean is one. The mask makes the path's own count, the
factor does not enter it. The released helper takes the mean log-prob where the formula has its
negative, which turns the sign of both paths; its scripts then match the formula on the teacher's
path and oppose it on the student's: ``sign: released`` is that student's path.

    opdctl stage opd --student DIR --teacher math=DIR --method scope
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opdctl.config.schema import REQUIRED, key
from opdctl.errors import Problem
from opdctl.protocols import Weight
from opdctl.scoring.columns import POLICY, RIGHT, TEACHER


class Scope(Weight):
    """Right rollouts by the student's perplexity, or wrong ones by the teacher's (SCOPE)."""

    revision = 1
    needs = ("verdict", "policy.logprobs", "teacher.logprobs")

    @dataclass(kw_only=True)
    class Config:
        """The keys of scope."""

        path: Literal["right", "wrong"] = key(
            REQUIRED, "right: PPL_S^(1/tau); wrong: PPL_T^(-1/tau)"
        )
        tau: float = key(1.0, "temperature of the softmax", least=1e-3)
        sign: Literal["formula", "released"] = key(
            "formula", "released: PPL_S^(-1/tau) on the right path, as the shipped scripts run"
        )

    @staticmethod
    def problems(config, stage) -> list[Problem]:
        """A switch of the path that it does not change."""
        if config.path == "wrong" and config.sign == "released":
            message = "on the wrong path the released scripts are the formula"
            return [Problem("sign", message, "sign=formula")]
        return []

    @staticmethod
    def lets_through(config) -> str:
        """Return the rollouts that it lets through."""
        return config.path

    def __init__(self, config) -> None:
        self.config = config

    def mask(self, step):
        """Return the mask. Shape [N]: 1 on the path."""
        return step.columns[RIGHT] == (self.config.path == "right")

    def factor(self, step):
        """Return the factor of each token. Shape [N]; the mean over a group's rollouts on the path
        is 1."""
        right = self.config.path == "right"
        nll_B = -step.mean(step.columns[POLICY if right else TEACHER])
        up = right and self.config.sign == "formula"
        score_B = (nll_B if up else -nll_B) / self.config.tau
        groups: dict[int, list[int]] = {}
        for b, rollout in enumerate(step.rollouts):
            if (rollout.right == 1.0) == right:
                groups.setdefault(rollout.group, []).append(b)
        weights = [1.0] * len(step.rollouts)
        for mine in groups.values():
            shares = (score_B[mine].softmax(0) * len(mine)).tolist()
            for b, share in zip(mine, shares, strict=True):
                weights[b] = share
        return step.spread(weights)
