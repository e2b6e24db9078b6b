"""The weight of skeleton: less of a token that the teacher doubts.

members: ./my_members
stages: {opd: {kind: opd, objectives: {divergence: {weights: {skeleton: {}}}}, ...}}
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import key


class Skeleton:
    """min(q / p, 1) of the sampled token, to a power."""

    revision = 1
    needs = ("policy.logprobs", "teacher.logprobs")

    @dataclass(kw_only=True)
    class Config:
        """The keys of skeleton."""

        power: float = key(1.0, "1 is the ratio itself, 0 no weight", least=0.0)

    def __init__(self, config) -> None:
        self.config = config

    def factor(self, step):
        """Return the factor of each token, from 0 to 1. Shape [N]."""
        ratio_N = step.columns["teacher"] - step.columns["policy"]
        return (self.config.power * ratio_N).clamp(max=0).exp()
