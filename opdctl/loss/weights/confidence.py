"""The teacher's confidence as a factor: 1 - H(q) / log |V|.

GUI-SD (arXiv 2605.00642), the entropy part of its weight, which is all that the released script
uses; the paper's second part, for the digits of coordinates, is left out. 1 where the teacher puts
all mass on one token, 0 where it is uniform. Mind that eopd acts where this one is small.
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.protocols import Weight
from opdctl.scoring.columns import TEACHER_ENTROPY


class Confidence(Weight):
    """1 - H(teacher) / log |V|: a confident teacher counts more (GUI-SD)."""

    revision = 1
    needs = ("teacher.entropy",)

    @dataclass(kw_only=True)
    class Config:
        """No keys."""

    def __init__(self, config) -> None:
        self.config = config

    def factor(self, step):
        """Return the factor of each token. Shape [N], from 0 to 1."""
        import math

        return 1 - step.columns[TEACHER_ENTROPY] / math.log(step.model.lm_head().valid_V)
