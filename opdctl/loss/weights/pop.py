"""GLM-5's gate on the mismatch of the engines: rho inside [1/beta, beta], 0 outside.

GLM-5 (arXiv 2602.15763) Eq. 1: rho = pi_old as the trainer computes it over pi_old as the sampler
did. It says nothing about how far the policy has moved since; that is the clip's part.
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.protocols import Weight
from opdctl.scoring.columns import BEHAVIOUR, POLICY


class Pop(Weight):
    """Trainer over sampler at the old weights, inside [1/beta, beta], else 0 (GLM-5)."""

    revision = 1
    is_importance_weight = True  # of trainer to sampler: one of these on an objective
    needs = ("behaviour.logprobs", "policy.logprobs")

    @dataclass(kw_only=True)
    class Config:
        """The keys of pop."""

        beta: float = key(2.0, "the interval is [1/beta, beta]", least=1.0)

    def __init__(self, config) -> None:
        self.config = config

    def gate(self, view):
        """Return the gate of each token. Shape [C], no gradient."""
        ratio_C = (view[POLICY] - view[BEHAVIOUR]).exp()
        inside_C = (ratio_C >= 1 / self.config.beta) & (ratio_C <= self.config.beta)
        view.log("mismatch", ratio_C)
        view.log("gate_open", inside_C.float())
        return ratio_C * inside_C
