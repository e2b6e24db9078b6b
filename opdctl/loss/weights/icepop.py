"""Importance weight of trainer over sampler at the old weights, zero outside [low, high].

IcePop, as NeMo-RL's MOPD uses it: the ratio corrects the mismatch of two engines and a token they
disagree on too much is dropped. GLM-5's pop is this with [1/beta, beta].
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.errors import Problem
from opdctl.protocols import Weight
from opdctl.scoring.columns import BEHAVIOUR


class Icepop(Weight):
    """Trainer over sampler at the old weights inside [low, high], 0 outside (IcePop)."""

    revision = 1
    is_importance_weight = True  # of trainer to sampler: one of these on an objective
    needs = ("behaviour.logprobs", "old.logprobs")

    @dataclass(kw_only=True)
    class Config:
        """The keys of icepop."""

        low: float = key(0.5, "smallest ratio let through", least=0)
        high: float = key(5.0, "largest ratio let through", least=0)

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
        ratio_C = (view.old_C - view[BEHAVIOUR]).exp()
        inside_C = (ratio_C >= self.config.low) & (ratio_C <= self.config.high)
        view.log("mismatch", ratio_C)
        view.log("gate_open", inside_C.float())
        return ratio_C * inside_C
