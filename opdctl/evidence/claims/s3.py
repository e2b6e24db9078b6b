"""S3, sparse to dense: each stage counts."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import Condition, mean_gain
from opdctl.protocols import Claim


class S3(Claim):
    """The student is worse without the teacher's RL, the bridge or OPD."""

    revision = 1
    statement = "each stage counts: the teacher's RL, the bridge, OPD"
    source = "Sparse to dense, arXiv 2605.12483, component ablation"
    reported = "MATH, points lost without each: 7.8, 1.7, 3.3"
    threshold = "s(all) > s(without it) of each, by the whole interval"

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        student: str = key(REQUIRED, "the student after all stages", ref=True)
        without: dict[str, str] = key(REQUIRED, "what is left out: that student", ref=True)
        domains: dict[str, bool] = key(REQUIRED, "domains of the mean score", domains=True)

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the loss in the mean score without each of the stages."""
        return [
            Condition(
                f"worth of {omitted}",
                mean_gain(roles.student, stage, roles.domains),
                least=1e-6,
                delta=0.0,
            )
            for omitted, stage in roles.without.items()
        ], ""
