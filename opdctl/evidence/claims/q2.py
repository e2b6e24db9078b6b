"""Q2, Qwen3 Table 21: pass@k rises under OPD and not under RL."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import Condition, mean_gain
from opdctl.protocols import Claim


class Q2(Claim):
    """OPD widens what the student can reach in 32 tries; RL does not."""

    revision = 1
    statement = "pass@k rises under OPD, not under RL"
    source = "Qwen3, arXiv 2505.09388, Table 21"
    reported = "AIME'24 pass@64: OPD +3.3, RL +0"
    threshold = "pass@32: OPD - S0 > 0; RL - S0 has 0 in its interval or lies below"

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        opd: str = key(REQUIRED, "the student after OPD", ref=True)
        rl: str = key(REQUIRED, "the student after RL", ref=True)
        start: str = key(REQUIRED, "the start of both", ref=True)
        domains: dict[str, bool] = key(REQUIRED, "domains of the mean", domains=True)

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test both differences."""
        opd, rl = (
            mean_gain(r, roles.start, roles.domains, "pass@32") for r in (roles.opd, roles.rl)
        )
        return [
            Condition("pass@32, OPD minus S0", opd, least=1e-6),
            Condition("pass@32, RL minus S0", rl, most=0.0, touches=True),
        ], ""
