"""Q1, Qwen3 Table 21: OPD does at least as well as RL for a tenth of the compute."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import DELTA, Condition, mean_gain, stage_name
from opdctl.protocols import Claim


class Q1(Claim):
    """OPD reaches RL's score with a tenth of its compute, counted for the student."""

    revision = 1
    statement = "OPD reaches RL's score with a tenth of its compute (student)"
    source = "Qwen3, arXiv 2505.09388, Table 21"
    reported = "AIME'24 74.4 and 67.6; 1800 and 17920 GPU hours"
    threshold = "s(OPD) >= s(RL) and flops(OPD) <= .1 flops(RL), of the student"

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        opd: str = key(REQUIRED, "the student after OPD", ref=True)
        rl: str = key(REQUIRED, "the student after RL, from the same start", ref=True)
        domains: dict[str, bool] = key(REQUIRED, "domains of the mean score", domains=True)

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the difference of the mean scores, and the ratio of the costs."""
        return conditions_by(roles, "student flops"), ""


def conditions_by(roles, count: str) -> list[Condition]:
    """Return the conditions, with the operations counted as the fact ``count`` does."""
    opd, rl = stage_name(roles.opd), stage_name(roles.rl)

    def ratio(s):
        return s.fact(opd, count) / s.fact(rl, count)

    return [
        Condition("OPD minus RL", mean_gain(opd, rl, roles.domains), least=0.0, delta=DELTA),
        Condition("flops, OPD to RL", ratio, most=0.1, delta=0.0),
    ]
