"""Gate on the teacher's entropy: 1 where it exceeds tau, 0 elsewhere.

EOPD (arXiv 2603.07079): L = L_OPD + 1[H(q) > tau] L_FKL, the mean over all tokens. Where the
teacher spreads its mass, the reverse KL would keep one of its modes; a forward KL put on these
tokens by this weight keeps them all. The gate does not enter the count. tau and the top 16 of the
method are from a replication that cites the paper's equations; the paper's own code was not read.

    opdctl stage opd --student DIR --teacher math=DIR --method eopd
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.schema import key


class Eopd:
    """1 where the teacher's entropy is above tau, else 0 (EOPD)."""

    revision = 1
    needs = ("teacher.entropy",)

    @dataclass(kw_only=True)
    class Config:
        """Keys of eopd."""

        tau: float = key(0.8, "nats; the whole vocabulary's entropy is compared", least=0.0)

    def __init__(self, config) -> None:
        self.config = config

    def factor(self, step):
        """Shape [N]; of pooled teachers the mean entropy decides."""
        return step.columns["teacher_entropy"] > self.config.tau
