"""M6, MOPD paper: a second round, with teachers refreshed from the first student, helps."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import Condition
from opdctl.protocols import Claim


class M6(Claim):
    """A second round of teachers and distillation raises the mean score."""

    revision = 1
    statement = "a second round with refreshed teachers helps"
    source = "MOPD, arXiv 2606.30406"
    reported = "Norm .937 -> .986"
    threshold = "mean score higher than after the first round"

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        first: str = key(REQUIRED, "the student after the first round", ref=True)
        second: str = key(REQUIRED, "the student after the second", ref=True)
        domains: dict[str, bool] = key(REQUIRED, "domains of the mean", domains=True)

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the mean score after the second round minus that after the first."""
        first, second = (r.removeprefix("stage:") for r in (roles.first, roles.second))
        domains = [d for d, on in roles.domains.items() if on]

        def gain(scores):
            return sum(scores[second, d] - scores[first, d] for d in domains) / len(domains)

        return [Condition("gain of the second round", gain, least=0.0)], ""
