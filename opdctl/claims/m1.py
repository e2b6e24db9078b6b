"""M1, MiMo-V2-Flash Table 7: MOPD puts every RL teacher's skill into one student."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.schema import REQUIRED, key
from opdctl.verdict import DELTA_RECOVERY, Part, norm, recovery, wide_gaps


@dataclass(kw_only=True)
class Roles:
    """Which stages play in a claim about recoveries."""

    student: str = key(REQUIRED, "the distilled student", ref=True)
    start: str = key(REQUIRED, "the student's starting checkpoint", ref=True)
    teachers: dict[str, str] = key(REQUIRED, "domain: its RL-made teacher", ref=True)


def names(roles) -> tuple[str, str, dict[str, str]]:
    """Student, start and teachers as evaluation records name them."""
    plain = {d: t.removeprefix("stage:") for d, t in roles.teachers.items()}
    return roles.student.removeprefix("stage:"), roles.start.removeprefix("stage:"), plain


class M1:
    """One student inherits every RL teacher."""

    revision = 1
    Config = Roles
    statement = "one student inherits every RL teacher"
    source = "MiMo-V2-Flash, arXiv 2601.02780, Table 7"
    threshold = "Norm >= .9 and min r_d >= .85"

    @staticmethod
    def parts(roles, found) -> tuple[list[Part], str]:
        """Norm and the recovery of each domain whose gap is wide enough."""
        student, start, teachers = names(roles)
        kept, left = wide_gaps(start, teachers, found)
        if not kept:
            return [], f"no gap of .10 in {', '.join(left)}"
        parts = [Part("Norm", norm(student, start, kept), least=0.9, delta=DELTA_RECOVERY)]
        parts += [
            Part(f"r_{d}", recovery(student, start, t, d), least=0.85, delta=DELTA_RECOVERY)
            for d, t in kept.items()
        ]
        return parts, f"left out, gap below .10: {', '.join(left)}" if left else ""
