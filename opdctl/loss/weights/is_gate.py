"""Importance weight of trainer over sampler, zero outside an interval.

MiMo-V2-Flash (arXiv 2601.02780) Eq. 8: w = sg[pi / mu] if low <= pi / mu <= high, else 0, where pi
is the policy being trained and mu the same policy as the sampler saw it.
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.errors import Problem
from opdctl.protocols import Weight
from opdctl.scoring.columns import BEHAVIOUR


class IsGate(Weight):
    """pi / mu inside [low, high], 0 outside (MiMo)."""

    revision = 1
    is_importance_weight = True  # of trainer to sampler: one of these on an objective
    needs = ("behaviour.logprobs",)

    @dataclass(kw_only=True)
    class Config:
        """The keys of is_gate. MiMo does not disclose its bounds; these are Nemotron-Cascade
        2's."""

        low: float = key(0.5, "smallest ratio let through", least=0)
        high: float = key(2.0, "largest ratio let through", least=0)

    @staticmethod
    def problems(config, stage) -> list[Problem]:
        """An interval that holds nothing."""
        if config.low <= config.high:
            return []
        return [Problem("low", f"{config.low} is above high, {config.high}")]

    def __init__(self, config) -> None:
        self.config = config

    def gate(self, view):
        """Return the gate of each token. Shape [C], no gradient."""
        ratio_C = (view.logprob_C.detach() - view[BEHAVIOUR]).exp()
        inside_C = (ratio_C >= self.config.low) & (ratio_C <= self.config.high)
        view.log("ratio", ratio_C)
        view.log("gate_open", inside_C.float())
        return ratio_C * inside_C
