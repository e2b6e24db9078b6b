"""Gate on the teacher's entropy: 1 where it exceeds tau, 0 elsewhere.

EOPD (arXiv 2603.07079): L = L_OPD + 1[H(q) > tau] L_FKL, the mean over all tokens. Where the
teacher spreads its mass, the reverse KL would keep one of its modes; a forward KL put on these
tokens by this weight keeps them all. The gate does not enter the count. tau and the top 16 of the
method are from a replication that cites the paper's equations; the paper's own code was not read.
A server does not give its entropy: with ``over: listed`` that of its k most probable tokens and
one bucket for the rest is compared, k as in the objective. It is a lower bound, so the gate opens
at some tokens fewer.

    opdctl stage opd --student DIR --teacher math=DIR --method eopd
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opdctl.config.schema import key
from opdctl.errors import Problem
from opdctl.protocols import Weight
from opdctl.scoring.columns import TEACHER_ENTROPY, TEACHER_LIST_ENTROPY


class Eopd(Weight):
    """1 where the teacher's entropy is above tau, else 0 (EOPD)."""

    revision = 1
    needs = ()  # all depend on its keys

    @dataclass(kw_only=True)
    class Config:
        """The keys of eopd."""

        tau: float = key(0.8, "nats; the whole vocabulary's entropy is compared", least=0.0)
        over: Literal["vocabulary", "listed"] = key(
            "vocabulary",
            "listed: of the teacher's k most probable tokens and a bucket, all a server gives",
            neutral=True,
        )

    @staticmethod
    def needs_for(config) -> tuple[str, ...]:
        """Return the need of the entropy it compares."""
        listed = config.over == "listed"
        return ("teacher.topk_list_entropy" if listed else "teacher.entropy",)

    @staticmethod
    def problems(config, stage) -> list[Problem]:
        """A list is as long as some objective says."""
        listing = [o for o in stage.objectives.values() if o.coef and o.k]
        if config.over == "vocabulary" or listing:
            return []
        message = "no objective here says how many of the teacher's tokens are listed"
        return [
            Problem("over", message, "objectives: {divergence: {support: topk_teacher, k: 16}}")
        ]

    def __init__(self, config) -> None:
        self.config, self.needs = config, self.needs_for(config)

    def factor(self, step):
        """Return the factor of each token. Shape [N]; of pooled teachers the mean entropy
        decides."""
        listed = self.config.over == "listed"
        return step.columns[TEACHER_LIST_ENTROPY if listed else TEACHER_ENTROPY] > self.config.tau
