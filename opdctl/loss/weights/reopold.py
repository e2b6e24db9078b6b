"""Two phases of token selection: drop what is beyond the floor, then keep where the student doubts.

REOPOLD (arXiv 2603.11137): the reward max(log q - log p, log(lambda) / (1 - lambda)) is the signal
reverse_kl with its key ``floor``; this is the mask M of -sum M R log p / sum M. In the first phase
M = 1 where the log-ratio is not below the floor; in the second the share of tokens with the highest
student entropy. Formulas and constants from two replications that agree, the paper was read in its
abstract alone; that the share is of the whole step is ours. The floor log(lambda / (1 - lambda))
that circulates is a misprint.

    opdctl stage opd --student DIR --teacher math=DIR --method reopold
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.errors import Problem
from opdctl.protocols import Weight
from opdctl.scoring.columns import POLICY, POLICY_ENTROPY, TEACHER


class Reopold(Weight):
    """First drops tokens below the floor, then keeps those of highest entropy (REOPOLD)."""

    revision = 1
    needs = ("teacher.logprobs", "policy.logprobs", "policy.entropy")

    @dataclass(kw_only=True)
    class Config:
        """The keys of reopold."""

        floor: float = key(0.1, "lambda, of log(lambda) / (1 - lambda)", least=1e-9, most=0.999)
        until: float = key(0.5, "share of the steps that are the first phase", least=0, most=1)
        keep: float = key(0.2, "share of the tokens kept in the second", least=1e-6, most=1)

    @staticmethod
    def problems(config, stage) -> list[Problem]:
        """A mask at another floor than the reward's."""
        beside = stage.signals.get("reverse_kl")
        if beside and beside.coef and beside.floor != config.floor:
            message = f"the reward's floor is {beside.floor:g}, the mask's {config.floor:g}"
            return [Problem("floor", message, f"signals.reverse_kl.floor={config.floor:g}")]
        return []

    def __init__(self, config) -> None:
        self.config = config

    def mask(self, step):
        """Return the mask. Shape [N]."""
        if step.done < self.config.until * step.steps:
            floor = math.log(self.config.floor) / (1 - self.config.floor)
            return step.columns[TEACHER] - step.columns[POLICY] >= floor
        return step.largest(step.columns[POLICY_ENTROPY], self.config.keep)
