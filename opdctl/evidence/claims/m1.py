"""M1, MiMo-V2-Flash Table 7: MOPD puts every RL teacher's skill into one student."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import DELTA_RECOVERY, Condition, norm, recovery, wide_gaps
from opdctl.protocols import Claim


@dataclass(kw_only=True)
class Roles:
    """The stages of a claim about recoveries."""

    student: str = key(REQUIRED, "the distilled student", ref=True)
    start: str = key(REQUIRED, "the student's starting checkpoint", ref=True)
    teachers: dict[str, str] = key(REQUIRED, "domain: its RL-made teacher", ref=True, domains=True)


def resolve_roles(roles, runs) -> tuple[str, str, dict[str, str], str]:
    """Return the student, the start, the teachers whose gap is wide enough, and a note.

    The names are those of stages, as records have them.
    """
    plain = {d: t.removeprefix("stage:") for d, t in roles.teachers.items()}
    start = roles.start.removeprefix("stage:")
    kept, left = wide_gaps(start, plain, runs)
    note = f"left out, gap below .10: {', '.join(left)}" if left else ""
    return roles.student.removeprefix("stage:"), start, kept, note


class M1(Claim):
    """One student inherits every RL teacher."""

    revision = 1
    Config = Roles
    statement = "one student inherits every RL teacher"
    source = "MiMo-V2-Flash, arXiv 2601.02780, Table 7"
    reported = "recovery of the RL-taught benchmarks .88 to 1.32"
    threshold = "Norm >= .9 and min r_d >= .85"

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the Norm, and the recovery of each domain whose gap is wide enough."""
        student, start, kept, note = resolve_roles(roles, runs)
        if not kept:
            return [], note
        conditions = [
            Condition("Norm", norm(student, start, kept), least=0.9, delta=DELTA_RECOVERY)
        ]
        for d, t in kept.items():
            value = recovery(student, start, t, d)
            conditions.append(Condition(f"r_{d}", value, least=0.85, delta=DELTA_RECOVERY))
        return conditions, note
