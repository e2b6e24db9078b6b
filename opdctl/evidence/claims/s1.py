"""S1, sparse to dense: labels spent on the teacher serve the student more than on itself."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import Condition, mean_gain
from opdctl.protocols import Claim


class S1(Claim):
    """A student of an RL-made teacher beats direct RL of the same student on the same labels."""

    revision = 1
    statement = "an RL-made teacher distilled over the bridge beats direct RL of the student"
    source = "Sparse to dense, arXiv 2605.12483, abstract"
    reported = "MATH 79.3 and 75.9, AIME'24 25.2 and 19.8"
    threshold = "s(distilled) > s(direct RL), by the whole interval"

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        student: str = key(REQUIRED, "the distilled student", ref=True)
        direct: str = key(REQUIRED, "the student after RL of its own", ref=True)
        domains: dict[str, bool] = key(REQUIRED, "domains of the mean score", domains=True)

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the difference of the mean scores."""
        gain = mean_gain(roles.student, roles.direct, roles.domains)
        return [Condition("distilled minus direct RL", gain, least=1e-6, delta=0.0)], ""
