"""Closed-form baseline of the sampled-token reverse KL: plus KL(p || q) at every token.

vOPD (arXiv 2605.07865): the value of a prefix is E_p[log q - log p] = -KL(p || q), so beside the
signal reverse_kl this one makes the advantage log q - log p + KL, of mean zero. It does not depend
on the token that was sampled, so the expected gradient stays the same. On the student's top k, both
renormalised, it is cheaper to store elsewhere and as unbiased. Needs one pass of the student over
its own rollouts before the update.

Its variance falls where student and teacher are about as sure, as the paper found and docs/methods
measured. It is not so in general: a baseline of least variance is the mean of the credit weighted
by the squared length of the gradient, which is near 0 for a token that the student is sure of.
Where the student is surer than its teacher the plain mean moves the rare tokens, which alone have a
gradient, further from 0: 3 to 7 times the variance was measured. The metric
``kl_baseline_variance`` says it of each step: the mean square of advantage x (1 - p of the sampled
token), with the baseline over without it. Above 1, leave it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opdctl.config.schema import key
from opdctl.config.settings import SignalConfig
from opdctl.errors import Problem
from opdctl.protocols import Signal
from opdctl.scoring.columns import POLICY_KL, TEACHER_WEIGHT


class KlBaseline(Signal):
    """KL(S || T) of the whole next-token distribution, added to reverse_kl: a mean of zero."""

    revision = 1
    needs = ("teacher.hidden", "policy.kl")
    is_baseline = True

    @dataclass(kw_only=True)
    class Config(SignalConfig):
        """The keys of kl_baseline."""

        support: Literal["full", "topk_student"] = key(
            "full", "the whole vocabulary, or the student's k most probable ids, renormalised"
        )
        k: int = key(100, "ids of topk_student (vOPD: 100)", least=1)

    @staticmethod
    def problems(config, stage) -> list[Problem]:
        """A baseline of nothing is noise: its expected gradient is zero."""
        beside = stage.signals.get("reverse_kl")
        if beside and beside.coef:
            return []
        message = "a baseline without reverse_kl beside it has no gradient on average"
        return [Problem("", message, "signals={reverse_kl: {}, kl_baseline: {}}")]

    def __init__(self, config, ctx) -> None:
        self.config = config

    def credit(self, step):
        """Return the credit of each token. Shape [N]; never negative."""
        return step.columns[POLICY_KL] * step.columns[TEACHER_WEIGHT]
