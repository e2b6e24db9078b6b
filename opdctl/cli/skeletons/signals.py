"""The credit of skeleton: the teacher's approval of a token, no token beyond a limit.

members: ./my_members
stages: {opd: {kind: opd, signals: {skeleton: {limit: 2.0}}, ...}}
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.config.settings import SignalConfig


class Skeleton:
    """log T - log S of the sampled token, within a limit."""

    revision = 1
    needs = ("teacher.logprobs", "policy.logprobs")

    @dataclass(kw_only=True)
    class Config(SignalConfig):
        """The keys of skeleton."""

        limit: float = key(5.0, "largest absolute credit of a token", least=0.0)

    def __init__(self, config, ctx) -> None:
        self.config = config

    def credit(self, step):
        """Return the credit of each token, larger is better. Shape [N]."""
        approval_N = step.columns["teacher"] - step.columns["policy"]
        return approval_N.clamp(-self.config.limit, self.config.limit)
