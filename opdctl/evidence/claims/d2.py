"""D2, DeepSeek-V4 section 5.2: logits rebuilt from cached hidden rows are the logits."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import Condition, stage_name
from opdctl.protocols import Claim


class D2(Claim):
    """Rebuilt logits are the teacher's logits."""

    revision = 1
    statement = "rebuilt logits are the logits"
    source = "DeepSeek-V4, arXiv 2606.19348, section 5.2"
    reported = "said, no numbers"
    threshold = "largest difference <= 1e-5 in fp32"

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        gradients: str = key(REQUIRED, "the gradients stage that compared them", ref=True)

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the largest difference, over the teachers."""
        stage = stage_name(roles.gradients)
        value = lambda s: s.fact(stage, "gap of rebuilt logits")  # noqa: E731
        return [Condition("largest difference", value, most=1e-5, delta=0.0)], ""
