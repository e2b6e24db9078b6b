"""A reward of 1 for an answer that the domain's verifier passes, else 0."""

from __future__ import annotations

from opdctl.protocols import Reward


class Verifier(Reward):
    """1 if the verifier of the prompt's domain passes the answer, else 0."""

    revision = 1
    parameters = 0

    def __init__(self, ctx) -> None:
        self.ctx = ctx

    def score(self, rollouts) -> None:
        """Set ``reward`` of every rollout to the verifier's verdict."""
        for rollout, verdict in zip(rollouts, self.ctx.verdicts.verify(rollouts), strict=True):
            rollout.reward = verdict
