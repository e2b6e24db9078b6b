"""M2, MOPD paper section 4: MOPD's student has a higher Norm than five other methods give."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import DELTA_RECOVERY, Condition, norm, wide_gaps
from opdctl.protocols import Claim


class M2(Claim):
    """MOPD beats mixed RL, cascade RL, off-policy fine-tuning and merged weights."""

    revision = 1
    statement = "MOPD beats its baselines at no more samples"
    source = "MOPD, arXiv 2606.30406, main table"
    reported = (
        "Norm .937; mixed RL .882, cascade .775, off-policy .824, average .328, arithmetic .857"
    )
    threshold = "Norm higher than each"

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        student: str = key(REQUIRED, "the distilled student", ref=True)
        start: str = key(REQUIRED, "the student's starting checkpoint", ref=True)
        teachers: dict[str, str] = key(
            REQUIRED, "domain: its RL-made teacher", ref=True, domains=True
        )
        baselines: dict[str, str] = key(REQUIRED, "name: a stage it is compared with", ref=True)

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the Norm of the student minus that of each baseline."""
        student = roles.student.removeprefix("stage:")
        start = roles.start.removeprefix("stage:")
        plain = {d: t.removeprefix("stage:") for d, t in roles.teachers.items()}
        kept, left = wide_gaps(start, plain, runs)
        note = f"left out, gap below .10: {', '.join(left)}" if left else ""
        if not kept:
            return [], note
        own = norm(student, start, kept)

        def ahead(baseline: str):
            other = norm(baseline.removeprefix("stage:"), start, kept)
            return lambda scores: own(scores) - other(scores)

        return [
            Condition(f"ahead of {name}", ahead(stage), least=0.0, delta=DELTA_RECOVERY)
            for name, stage in roles.baselines.items()
        ], note
