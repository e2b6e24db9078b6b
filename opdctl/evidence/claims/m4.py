"""M4, MOPD paper: teachers of another origin than the student teach worse."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import DELTA_RECOVERY, Part, name, norm, wide_gaps


class M4:
    """Teachers of another origin start further away and teach less."""

    revision = 1
    statement = "teachers of another origin teach worse"
    source = "MOPD, arXiv 2606.30406, teacher of another origin"
    reported = "initial KL .04 -> .19; Norm .937 -> .600"
    threshold = "initial per-token KL at least 3 times higher, and Norm lower"

    @dataclass(kw_only=True)
    class Config:
        """Who plays."""

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
    def parts(roles, found) -> tuple[list[Part], str]:
        """Ratio of the divergences at the first step, and the difference of the Norms."""
        start, ours, theirs = name(roles.start), name(roles.student), name(roles.other)

        same, left = wide_gaps(start, {d: name(t) for d, t in roles.teachers.items()}, found)
        away, narrow = wide_gaps(
            start, {d: name(t) for d, t in roles.other_teachers.items()}, found
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
            Part("initial KL, other to own", ratio, least=3.0, delta=0.0),
            Part("Norm, own minus other", ahead, least=1e-6, delta=DELTA_RECOVERY),
        ], note
