"""Reward 1 for an answer that the domain's own verifier passes, else 0."""

from __future__ import annotations


class Verifier:
    """1 if the verifier of the prompt's domain passes the answer, else 0."""

    revision = 1
    parameters = 0

    def __init__(self, ctx) -> None:
        self.ctx = ctx

    def score(self, rollouts) -> None:
        """Sets ``reward`` of every rollout."""
        for rollout, right in zip(rollouts, self.ctx.verify(rollouts), strict=True):
            rollout.reward = right
