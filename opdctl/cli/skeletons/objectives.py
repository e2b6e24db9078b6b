"""The loss of skeleton: the negative log-likelihood of a token, to a power.

members: ./my_members
stages: {sft: {kind: sft, objectives: {skeleton: {power: 1.0}}, ...}}
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.config.settings import ObjectiveConfig


class Skeleton:
    """-log p of the token that stands there, to a power."""

    revision = 1
    needs = ()
    rows = "prediction"

    @dataclass(kw_only=True)
    class Config(ObjectiveConfig):
        """The keys of skeleton."""

        power: float = key(1.0, "1 is the negative log-likelihood", least=1.0)

    def __init__(self, config) -> None:
        self.config = config

    def loss(self, view):
        """Return the loss of each token of a chunk, with its gradient. Shape [C]."""
        view.log("nll", -view.logprob_C)
        return (-view.logprob_C) ** self.config.power
