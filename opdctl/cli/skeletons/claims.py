"""The claim of skeleton: a model scores higher than another one in a domain.

members: ./my_members
claims: {skeleton: {better: stage:opd, worse: stage:sft, domain: math}}
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import Condition, gain
from opdctl.protocols import Claim


class Skeleton(Claim):
    """A model scores higher than another one in a domain."""

    revision = 1
    statement = "one model beats the other"
    source = "ours"
    reported = "no numbers"
    threshold = "s(better) >= s(worse)"

    @dataclass(kw_only=True)
    class Config:
        """The roles of skeleton."""

        better: str = key(REQUIRED, "the model that is said to score higher", ref=True)
        worse: str = key(REQUIRED, "the other one", ref=True)
        domain: str = key(REQUIRED, "where", domains=True)

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Return the numbers that decide, each with its threshold, and a note.

        Args:
            runs: the measurements of each run.
        """
        value = gain(roles.better, roles.worse, roles.domain)
        return [Condition(f"gain in {roles.domain}", value, least=0.0)], ""
