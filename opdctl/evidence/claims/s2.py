"""S2, sparse to dense: a teacher without RL serves its student less than direct RL does."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import Condition, mean_gain
from opdctl.protocols import Claim


class S2(Claim):
    """Distilling the teacher before its RL falls behind direct RL of the student."""

    revision = 1
    statement = "the same teacher before its RL serves the student less than direct RL"
    source = "Sparse to dense, arXiv 2605.12483, abstract"
    reported = "raw teacher below direct RL below RL-made teacher, on Qwen3 and Llama"
    threshold = "s(of the raw teacher) < s(direct RL), by the whole interval"

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        raw: str = key(REQUIRED, "the student of the teacher before its RL", ref=True)
        direct: str = key(REQUIRED, "the student after RL of its own", ref=True)
        domains: dict[str, bool] = key(REQUIRED, "domains of the mean score", domains=True)

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the difference of the mean scores."""
        gain = mean_gain(roles.direct, roles.raw, roles.domains)
        return [Condition("direct RL minus raw teacher", gain, least=1e-6, delta=0.0)], ""
