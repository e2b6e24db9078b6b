"""T3, Thinking Machines: the old self as teacher restores what training on documents lost."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import (
    DELTA,
    DELTA_RECOVERY,
    Condition,
    mean_gain,
    mean_score,
    stage_name,
)
from opdctl.protocols import Claim


class T3(Claim):
    """The old self restores what domain training lost, and the new knowledge stays."""

    revision = 1
    statement = "the old self restores what domain training lost"
    source = "Thinking Machines, On-Policy Distillation"
    reported = "IF-eval 85 -> 79 -> 83; internal QA 18 -> 36 -> 41"
    threshold = ">= .95 of the loss regained, new knowledge kept within .03"

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        before: str = key(REQUIRED, "the old self", ref=True)
        trained: str = key(REQUIRED, "after the domain training", ref=True)
        student: str = key(REQUIRED, "after OPD from the old self", ref=True)
        lost: dict[str, bool] = key(REQUIRED, "domains that the training lost", domains=True)
        learned: dict[str, bool] = key(REQUIRED, "domains that it taught", domains=True)

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the share regained, and the change on the learned domains."""
        models = [stage_name(r) for r in (roles.before, roles.trained, roles.student)]
        before, trained, student = (mean_score(m, roles.lost) for m in models)
        losses = [before(m.scores()) - trained(m.scores()) for m in runs]
        if min(losses) < 0.10:  # a share divides by it, seed by seed
            return [], "on a seed the training lost less than .10: too little to regain"
        kept = mean_gain(roles.student, roles.trained, roles.learned)

        def regained(s):
            return (student(s) - trained(s)) / (before(s) - trained(s))

        return [
            Condition("share regained", regained, least=0.95, delta=DELTA_RECOVERY),
            Condition("change of what was learned", kept, least=-DELTA),
        ], ""
