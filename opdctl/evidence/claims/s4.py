"""S4, sparse to dense: RL of the student adds to the bridge."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import Condition, mean_gain
from opdctl.protocols import Claim


class S4(Claim):
    """RL of the student after the bridge raises its score."""

    revision = 1
    statement = "RL of the student after the bridge helps"
    source = "Sparse to dense, arXiv 2605.12483, stage 3"
    reported = "MATH 75.4 -> 78.5, 2.8 above a replay control, which is not run here"
    threshold = "s(after) > s(before), by the whole interval"

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        before: str = key(REQUIRED, "the student before its RL", ref=True)
        after: str = key(REQUIRED, "the student after it", ref=True)
        domains: dict[str, bool] = key(REQUIRED, "domains of the mean score", domains=True)

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the difference of the mean scores."""
        gain = mean_gain(roles.after, roles.before, roles.domains)
        return [Condition("after minus before", gain, least=1e-6, delta=0.0)], ""
