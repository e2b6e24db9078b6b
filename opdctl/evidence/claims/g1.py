"""G1, GLM-5: reinforcement learning in one domain after the other forgets the earlier ones."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import DELTA, Condition, gain
from opdctl.protocols import Claim


class G1(Claim):
    """Sequential RL forgets what an earlier stage taught."""

    revision = 1
    statement = "sequential RL forgets"
    source = "GLM-5, arXiv 2602.15763, cross-stage distillation"
    reported = "no numbers"
    threshold = "s_A(end) <= s_A(after A) - .03 for at least one earlier domain"

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        end: str = key(REQUIRED, "the model after the last RL stage", ref=True)
        after: dict[str, str] = key(
            REQUIRED, "domain: the stage that taught it", ref=True, domains=True
        )

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the change of each earlier domain; one fall is enough."""
        return [
            Condition(f"change of {d}", gain(roles.end, a, d), most=-DELTA, alternative=True)
            for d, a in roles.after.items()
        ], ""
