"""M4, MOPD paper: teachers of another origin than the student teach worse."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import DELTA_RECOVERY, Condition, norm, stage_name, wide_gaps
from opdctl.protocols import Claim


class M4(Claim):
    """Teachers of another origin start further away and teach less."""

    revision = 1
    statement = "teachers of another origin teach worse"
    source = "MOPD, arXiv 2606.30406, teacher of another origin"
    reported = "initial KL .04 -> .19; Norm .937 -> .600"
    threshold = "initial per-token KL at least 3 times higher, and Norm lower"

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        start: str = key(REQUIRED, "the start of both students", ref=True)
        student: str = key(REQUIRED, "taught by teachers of its own origin", ref=True)
        teachers: dict[str, str] = key(
            REQUIRED, "domain: its teacher of the same origin", ref=True, domains=True
        )
        other: str = key(REQUIRED, "taught by teachers of another origin", ref=True)
        other_teachers: dict[str, str] = key(
            REQUIRED, "domain: the other one", ref=True, domains=True
        )

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the ratio of the divergences at the first step, and the difference of the Norms."""
        start, ours, theirs = (
            stage_name(roles.start),
            stage_name(roles.student),
            stage_name(roles.other),
        )

        same, left = wide_gaps(start, {d: stage_name(t) for d, t in roles.teachers.items()}, runs)
        away, narrow = wide_gaps(
            start, {d: stage_name(t) for d, t in roles.other_teachers.items()}, runs
        )
        both = [d for d in same if d in away]
        left = sorted({*left, *narrow})
        note = f"left out, gap below .10: {', '.join(left)}" if left else ""
        if not both:
            return [], note

        def first(s, stage: str) -> float:
            row = s.curve(stage, "kl")[0]
            return sum(row[d] for d in both) / len(both)

        def ratio(s):
            return first(s, theirs) / first(s, ours)

        def ahead(s):
            return own(s) - other(s)

        own = norm(ours, start, {d: same[d] for d in both})
        other = norm(theirs, start, {d: away[d] for d in both})
        return [
            Condition("initial KL, other to own", ratio, least=3.0, delta=0.0),
            Condition("Norm, own minus other", ahead, least=1e-6, delta=DELTA_RECOVERY),
        ], note
