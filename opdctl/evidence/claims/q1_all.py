"""Q1 with the teacher's forward passes counted, which the report's GPU hours leave open."""

from __future__ import annotations

from opdctl.evidence.claims.q1 import Q1


class Q1All(Q1):
    """OPD reaches RL's score with a tenth of its compute, teacher scoring counted."""

    statement = "OPD reaches RL's score with a tenth of its compute (with teacher scoring)"
    threshold = "s(OPD) >= s(RL) and flops(OPD) <= .1 flops(RL), teacher scoring counted"
    count = "all flops"
