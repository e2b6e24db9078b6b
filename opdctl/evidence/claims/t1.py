"""T1, Thinking Machines: OPD into the base takes a fraction of the steps that the RL took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import DELTA, Condition, stage_name
from opdctl.protocols import Claim

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from opdctl.evidence.measured import Scores

WINDOW = 3  # steps over which the accuracy of the rollouts is averaged


class T1(Claim):
    """OPD back into the base reaches the RL-made teacher in a fifth of the steps."""

    revision = 1
    statement = "OPD back into the base needs a fifth of the steps that the RL took"
    source = "Thinking Machines, On-Policy Distillation"
    reported = "under 10 steps against about 70"
    threshold = "steps(OPD to teacher - .03) <= .2 steps(RL)"

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        opd: str = key(REQUIRED, "the opd stage, from the start of the RL", ref=True)
        teacher: str = key(REQUIRED, "the rl stage that made the teacher", ref=True)
        domain: str = key(REQUIRED, "domain of both", domains=True)

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the steps until the rollouts are within .03 of the teacher on held-out prompts.

        A run that never gets there counts as one that took all of RL's steps.
        """
        import numpy as np

        opd, teacher, domain = stage_name(roles.opd), stage_name(roles.teacher), roles.domain

        def steps(s: Scores, stage: str) -> NDArray[np.float64]:
            levels = np.atleast_1d(s[teacher, domain]) - DELTA
            curve = [row[domain] for row in s.curve(stage, "accuracy")]
            ends = range(WINDOW, len(curve) + 1)
            best = np.maximum.accumulate([sum(curve[e - WINDOW : e]) / WINDOW for e in ends])
            first = np.searchsorted(best, levels)  # the place of the first that is no lower
            return np.where(first < len(best), first + float(WINDOW), np.inf)

        def share(s: Scores) -> NDArray[np.float64]:
            of_rl = np.minimum(1.0, steps(s, opd) / len(s.curve(teacher, "accuracy")))
            return of_rl if len(of_rl) > 1 else of_rl[0]

        took = [float(steps(m.scores(), teacher)[0]) for m in runs]
        taken = ", ".join("never" if t == float("inf") else f"{t:.0f}" for t in took)
        note = f"step at which RL's own rollouts came to that level: {taken}"
        return [Condition("share of RL's steps", share, most=0.2, delta=0.0)], note
