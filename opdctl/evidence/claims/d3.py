"""D3, DeepSeek-V4 section 5.2: with rows ordered by teacher each head is loaded once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import Condition, stage_name
from opdctl.protocols import Claim

if TYPE_CHECKING:
    from opdctl.evidence.measured import Scores


class D3(Claim):
    """Each teacher's head is loaded once per mini-batch, and at most two are resident."""

    revision = 1
    statement = "one head load per teacher and mini-batch"
    source = "DeepSeek-V4, arXiv 2606.19348, section 5.2"
    reported = "one load per teacher and mini-batch"
    threshold = "loads = distinct teachers of the mini-batch; at most two heads resident"

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        student: str = key(REQUIRED, "the opd stage", ref=True)

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the largest excess of loads over teachers in a step, and of resident heads."""
        stage = stage_name(roles.student)

        def excess(s: Scores) -> float:
            pairs = zip(s.curve(stage, "head_loads"), s.curve(stage, "teachers"), strict=True)
            return max(0.0, *(float(loads - teachers) for loads, teachers in pairs))

        def heads(s: Scores) -> float:
            return float(max(s.curve(stage, "heads")))

        return [
            Condition("loads beyond teachers", excess, most=0.0, delta=0.0),
            Condition("heads resident", heads, most=2.0, delta=0.0),
        ], ""
