"""The teacher of skeleton: a model whose log-probs never fall below a floor.

    members: ./my_members
    stages: {opd: {kind: opd, teachers: {math: {model: DIR, scored_by: {skeleton: {}}}}, ...}}

Its distribution is mixed with the uniform one, so that one token it cannot stand does not decide
about a whole response.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.scoring.teachers.local import Local


class Skeleton(Local):
    """A model on this machine, mixed with the uniform distribution."""

    revision = 1
    provides = ("teacher.logprobs",)

    @dataclass(kw_only=True)
    class Config:
        """The keys of skeleton."""

        share: float = key(0.01, "of the uniform distribution", least=1e-6, most=0.5)

    def __init__(self, config, ctx, student, name: str, reference: str) -> None:
        super().__init__(ctx, student, name, reference)
        self.config = config

    def score(self, requests, asks, run, other_ids_N=None):
        """Return the scores of every target token, in the order of the requests."""
        scores = super().score(requests, asks, run, other_ids_N)
        scores.per_token["logprobs"] = self.mixed(scores.logprobs_N, self.student.valid_V)
        return scores

    def mixed(self, logprobs_N, size: int):
        """Return log((1 - share) q + share / size) of log q. Shape [N]."""
        import torch

        kept_N = logprobs_N + math.log1p(-self.config.share)
        floor_N = torch.full_like(logprobs_N, math.log(self.config.share / size))
        return torch.logaddexp(kept_N, floor_N)
