"""G3, GLM-5: one response per prompt (G = 1) does as well as groups, at as many responses."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import DELTA, Condition, mean_gain
from opdctl.protocols import Claim


class G3(Claim):
    """Groups of one are as good as groups of several at equal sequences."""

    revision = 1
    statement = "G = 1 is as good as G = 4 at equal sequences"
    source = "GLM-5, arXiv 2602.15763, cross-stage distillation"
    reported = "G = 1, batch 1024; no comparison"
    threshold = "difference of the mean scores >= -.03"

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        one: str = key(REQUIRED, "the student of groups of one", ref=True)
        several: str = key(REQUIRED, "the student of larger groups", ref=True)
        domains: dict[str, bool] = key(REQUIRED, "domains of the mean", domains=True)

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the difference of the mean scores."""
        ahead = mean_gain(roles.one, roles.several, roles.domains)
        return [Condition("G = 1 minus G = 4", ahead, least=-DELTA)], ""
