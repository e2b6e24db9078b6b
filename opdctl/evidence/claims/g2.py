"""G2, GLM-5: distillation from the checkpoints of earlier stages recovers what later ones lost."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import DELTA, DELTA_RECOVERY, Condition, gain, stage_name
from opdctl.protocols import Claim


class G2(Claim):
    """Cross-stage distillation recovers every earlier domain, cheaply."""

    revision = 1
    statement = "cross-stage OPD recovers what was forgotten, cheaply"
    source = "GLM-5, arXiv 2602.15763, Eq. 2"
    reported = "no numbers"
    threshold = (
        "every earlier domain >= its stage-best - .05; last stage >= before - .03; "
        "flops <= .25 of the RL stages together"
    )

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        student: str = key(REQUIRED, "the distilled student", ref=True)
        before: str = key(REQUIRED, "its start: the model after the last RL stage", ref=True)
        stages: dict[str, str] = key(REQUIRED, "every stage of the chain, by any name", ref=True)
        rl: dict[str, str] = key(REQUIRED, "its RL stages, by any name", ref=True)
        domains: dict[str, bool] = key(REQUIRED, "domains of earlier stages", domains=True)
        last: dict[str, bool] = key(REQUIRED, "domains of the last stage", domains=True)

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test each domain's distance to its best stage, and the cost."""
        student = stage_name(roles.student)
        chain, rl = ([stage_name(r) for r in m.values()] for m in (roles.stages, roles.rl))

        def to_best(domain: str):
            means = {c: sum(m.scores()[c, domain] for m in runs) for c in chain}
            best = max(chain, key=lambda c: means[c])
            return best, gain(student, best, domain)

        conditions = []
        for d in (d for d, on in roles.domains.items() if on):
            best, value = to_best(d)
            conditions.append(Condition(f"{d} to {best}", value, least=-DELTA_RECOVERY))
        conditions += [
            Condition(f"change of {d}", gain(student, roles.before, d), least=-DELTA)
            for d, on in roles.last.items()
            if on
        ]

        def share(s):
            return s.fact(student, "all flops") / sum(s.fact(r, "all flops") for r in rl)

        return [*conditions, Condition("share of the RL flops", share, most=0.25, delta=0.0)], ""
