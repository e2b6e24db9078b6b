"""G4, GLM-5: a domain whose teacher is left out does not recover."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.errors import Problem
from opdctl.evidence.verdict import DELTA_RECOVERY, Condition, recovery, stage_name, wide_gaps
from opdctl.protocols import Claim


class G4(Claim):
    """A domain does not recover without its teacher."""

    revision = 1
    statement = "no recovery without the teacher"
    source = "GLM-5, arXiv 2602.15763, Figure 5"
    reported = "no ablation"
    threshold = "recovery of the left-out domain <= .3"

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        start: str = key(REQUIRED, "the student's starting checkpoint", ref=True)
        teachers: dict[str, str] = key(
            REQUIRED, "domain: the teacher left out", ref=True, domains=True
        )
        without: dict[str, str] = key(
            REQUIRED, "domain: the student without it", ref=True, domains=True
        )

    @staticmethod
    def problems(roles) -> list[Problem]:
        """Return the problems that the schema cannot see."""
        if roles.teachers.keys() == roles.without.keys():
            return []
        return [Problem("without", "its domains are not those of teachers", "one student for each")]

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the recovery of each left-out domain whose gap is wide enough."""
        start = stage_name(roles.start)
        kept, left = wide_gaps(start, {d: stage_name(t) for d, t in roles.teachers.items()}, runs)
        note = f"left out, gap below .10: {', '.join(left)}" if left else ""
        return [
            Condition(
                f"r_{d} without its teacher",
                recovery(stage_name(roles.without[d]), start, t, d),
                most=0.3,
                delta=DELTA_RECOVERY,
            )
            for d, t in kept.items()
        ], note
