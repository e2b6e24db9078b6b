"""Q5, Qwen3 Table 22: the general stages cost a little reasoning and raise the rest."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import DELTA, Condition, mean_gain
from opdctl.protocols import Claim


class Q5(Claim):
    """Fusion and general RL lower reasoning a little and raise the general score."""

    revision = 1
    statement = "general stages lower reasoning a little and raise the general score"
    source = "Qwen3, arXiv 2505.09388, Table 22"
    reported = "AIME'24 83.8 -> 81.4; IFEval 73.0 -> 85.0"
    threshold = "reasoning falls by 0 to .10; general rises by more than .03"

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        before: str = key(REQUIRED, "after reasoning RL", ref=True)
        after: str = key(REQUIRED, "after general RL", ref=True)
        reasoning: dict[str, bool] = key(REQUIRED, "domains of reasoning", domains=True)
        general: dict[str, bool] = key(REQUIRED, "domains of the general stages", domains=True)

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the fall of the one mean and the rise of the other."""
        fall = mean_gain(roles.before, roles.after, roles.reasoning)
        rise = mean_gain(roles.after, roles.before, roles.general)
        return [
            Condition("fall of reasoning", fall, least=0.0, most=0.10),
            Condition("rise of general", rise, least=DELTA),
        ], ""
