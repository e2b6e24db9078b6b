"""D1, DeepSeek-V4 section 5: the full vocabulary gives the quieter gradient."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import Condition, stage_name
from opdctl.protocols import Claim


class D1(Claim):
    """The full-vocabulary gradient is the sampled-token gradient with less noise."""

    revision = 1
    statement = "full vocabulary has the quieter gradient"
    source = "DeepSeek-V4, arXiv 2606.19348, section 5.2"
    reported = "said, no numbers"
    threshold = "trace variance sampled / full >= 2, cosine of the means >= .95"

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        gradients: str = key(REQUIRED, "the gradients stage that compared them", ref=True)

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the ratio of the trace variances, and the cosine."""
        stage = stage_name(roles.gradients)

        def ratio(s):
            sampled = s.fact(stage, "variance of policy_gradient")
            return sampled / s.fact(stage, "variance of divergence")

        def cosine(s):
            return s.fact(stage, "cosine of policy_gradient and divergence")

        return [
            Condition("variance, sampled to full", ratio, least=2.0, delta=0.0),
            Condition("cosine of the means", cosine, least=0.95, delta=0.0),
        ], ""
