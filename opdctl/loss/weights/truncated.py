"""Importance weight of trainer over sampler at the old weights, cut at a cap.

Truncated importance sampling: min(pi_old / mu, cap). No token is dropped; the cap bounds variance
at the price of a bias for tokens the sampler found much less likely. ExOPD (arXiv 2602.12125) uses
a cap of 5.
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.protocols import Weight
from opdctl.scoring.columns import BEHAVIOUR


class Truncated(Weight):
    """Trainer over sampler at the old weights, at most cap (truncated importance sampling)."""

    revision = 1
    is_importance_weight = True  # of trainer to sampler: one of these on an objective
    needs = ("behaviour.logprobs", "old.logprobs")

    @dataclass(kw_only=True)
    class Config:
        """The keys of truncated."""

        cap: float = key(5.0, "largest weight", least=1e-3)

    def __init__(self, config) -> None:
        self.config = config

    def gate(self, view):
        """Return the gate of each token. Shape [C], no gradient."""
        ratio_C = (view.old_C - view[BEHAVIOUR]).exp()
        view.log("mismatch", ratio_C)
        view.log("gate_open", (ratio_C <= self.config.cap).float())
        return ratio_C.clamp(max=self.config.cap)
