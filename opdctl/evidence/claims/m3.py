"""M3, MiMo-V2-Flash Figure 6: in 50 steps the teacher's dense signal does what reward alone does
not, and the two together lose nothing."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.claims.m1 import Roles, resolve_roles
from opdctl.evidence.verdict import DELTA_RECOVERY, Condition, norm
from opdctl.protocols import Claim


@dataclass(kw_only=True)
class Arms(Roles):
    """The three arms, from one start, in 50 steps each."""

    kl_only: str = key(REQUIRED, "the arm without outcome", ref=True)
    orm_only: str = key(REQUIRED, "the arm without teachers", ref=True)


class M3(Claim):
    """Dense signal does in 50 steps what reward alone does not."""

    revision = 1
    Config = Arms
    statement = "dense signal does in 50 steps what reward alone does not"
    source = "MiMo-V2-Flash, arXiv 2601.02780, Figure 6"
    reported = "AIME25 from 86: ORM only flat, KL only 93.7, both 92.2 (teacher 93.9)"
    threshold = "ORM-only Norm <= .3; KL-only >= .7; KL + ORM >= KL-only - .05"

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the Norm of two arms, and the difference of the third to one of them."""
        student, start, kept, note = resolve_roles(roles, runs)
        if not kept:
            return [], note
        orm = norm(roles.orm_only.removeprefix("stage:"), start, kept)
        kl = norm(roles.kl_only.removeprefix("stage:"), start, kept)
        both = norm(student, start, kept)
        return [
            Condition("Norm(ORM only)", orm, most=0.3, delta=DELTA_RECOVERY),
            Condition("Norm(KL only)", kl, least=0.7, delta=DELTA_RECOVERY),
            Condition(
                "Norm(KL + ORM) - Norm(KL)",
                lambda s: both(s) - kl(s),
                least=-0.05,
                delta=DELTA_RECOVERY,
            ),
        ], note
