"""M5, MiMo-V2-Flash Table 7 (rows with a Self teacher): a domain taught by the student's own start
stays where it was."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import DELTA, Condition
from opdctl.protocols import Claim


class M5(Claim):
    """A self-teacher keeps its domain."""

    revision = 1
    statement = "a self-teacher keeps its domain"
    source = "MiMo-V2-Flash, arXiv 2601.02780, Table 7"
    reported = "self-taught benchmarks -3.9 to +4.1 points"
    threshold = "absolute change <= .03"

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        student: str = key(REQUIRED, "the distilled student", ref=True)
        start: str = key(REQUIRED, "the student's starting checkpoint", ref=True)
        domains: dict[str, bool] = key(
            REQUIRED, "domains that are taught by the start itself", domains=True
        )

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the change of each self-taught domain."""
        student = roles.student.removeprefix("stage:")
        start = roles.start.removeprefix("stage:")
        return [
            Condition(
                f"change of {d}",
                lambda s, d=d: s[student, d] - s[start, d],
                least=-DELTA,
                most=DELTA,
            )
            for d, on in roles.domains.items()
            if on
        ], ""
