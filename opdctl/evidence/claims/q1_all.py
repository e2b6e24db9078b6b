"""Q1 with the teacher's forward passes counted, which the report's GPU hours leave open."""

from __future__ import annotations

from opdctl.evidence.claims.q1 import Q1, conditions_by
from opdctl.evidence.verdict import Condition


class Q1All(Q1):
    """OPD reaches RL's score with a tenth of its compute, teacher scoring counted."""

    statement = "OPD reaches RL's score with a tenth of its compute (with teacher scoring)"
    threshold = "s(OPD) >= s(RL) and flops(OPD) <= .1 flops(RL), teacher scoring counted"

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the difference of the mean scores, and the ratio of the costs."""
        return conditions_by(roles, "all flops"), ""
