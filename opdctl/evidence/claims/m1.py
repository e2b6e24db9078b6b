"""M1, MiMo-V2-Flash Table 7: MOPD puts every RL teacher's skill into one student."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import DELTA_RECOVERY, Part, norm, recovery, wide_gaps


@dataclass(kw_only=True)
class Roles:
    """Which stages play in a claim about recoveries."""

    student: str = key(REQUIRED, "the distilled student", ref=True)
    start: str = key(REQUIRED, "the student's starting checkpoint", ref=True)
    teachers: dict[str, str] = key(REQUIRED, "domain: its RL-made teacher", ref=True, domains=True)


def cast(roles, found) -> tuple[str, str, dict[str, str], str]:
    """Student, start, teachers whose gap is wide enough as records name them, and a note."""
    plain = {d: t.removeprefix("stage:") for d, t in roles.teachers.items()}
    start = roles.start.removeprefix("stage:")
    kept, left = wide_gaps(start, plain, found)
    note = f"left out, gap below .10: {', '.join(left)}" if left else ""
    return roles.student.removeprefix("stage:"), start, kept, note


class M1:
    """One student inherits every RL teacher."""

    revision = 1
    Config = Roles
    statement = "one student inherits every RL teacher"
    source = "MiMo-V2-Flash, arXiv 2601.02780, Table 7"
    reported = "recovery of the RL-taught benchmarks .88 to 1.32"
    threshold = "Norm >= .9 and min r_d >= .85"

    @staticmethod
    def parts(roles, found) -> tuple[list[Part], str]:
        """Norm and the recovery of each domain whose gap is wide enough."""
        student, start, kept, note = cast(roles, found)
        if not kept:
            return [], note
        parts = [Part("Norm", norm(student, start, kept), least=0.9, delta=DELTA_RECOVERY)]
        for d, t in kept.items():
            value = recovery(student, start, t, d)
            parts.append(Part(f"r_{d}", value, least=0.85, delta=DELTA_RECOVERY))
        return parts, note
