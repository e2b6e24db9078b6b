"""Q4, Qwen3 section 4.7 (ThinkFollow): the switch between the modes is inherited."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import DELTA, Condition, mean_gain
from opdctl.protocols import Claim


class Q4(Claim):
    """The student obeys the mode switch as its teacher does."""

    revision = 1
    statement = "the mode switch is inherited"
    source = "Qwen3, arXiv 2505.09388, Table 22"
    reported = "ThinkFollow of the teacher 88.7 -> 98.9; the student's is not given"
    threshold = "obedience >= teacher's - .03 in both modes"

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        student: str = key(REQUIRED, "the distilled student", ref=True)
        teacher: str = key(REQUIRED, "its teacher", ref=True)
        think: dict[str, bool] = key(REQUIRED, "domains that ask for thinking", domains=True)
        no_think: dict[str, bool] = key(REQUIRED, "domains that ask for none", domains=True)

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the obedience of the student minus the teacher's, by mode."""
        conditions = []
        for mode in ("think", "no_think"):
            domains = getattr(roles, mode)
            value = mean_gain(roles.student, roles.teacher, domains, "obedience")
            conditions.append(Condition(f"{mode}, student minus teacher", value, least=-DELTA))
        return conditions, ""
