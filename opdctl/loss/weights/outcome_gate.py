"""Distil on wrong rollouts only, or on right ones only.

Unmasking OPD (arXiv 2605.10889) found the gradient of distillation much better aligned with the
ideal one on wrong rollouts; right ones got mostly noise. The mask makes the count: a step whose
rollouts are all on the other side trains on nothing, which the watchdog ``empty`` reports.

    opdctl stage opd --student DIR --teacher math=DIR --method unmasking
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opdctl.config.schema import key
from opdctl.protocols import Weight
from opdctl.scoring.columns import RIGHT


class OutcomeGate(Weight):
    """1 on the rollouts that the verifier fails, 0 on the others; or the other way round."""

    revision = 1
    needs = ("verdict",)

    @dataclass(kw_only=True)
    class Config:
        """The keys of outcome_gate."""

        on: Literal["wrong", "right"] = key("wrong", "which rollouts count")

    @staticmethod
    def lets_through(config) -> str:
        """Return the rollouts that it lets through."""
        return config.on

    def __init__(self, config) -> None:
        self.config = config

    def mask(self, step):
        """Return the mask. Shape [N]."""
        return step.columns[RIGHT] == (self.config.on == "right")
