"""Reverse KL: the k most probable tokens exactly, the rest by the token that was sampled.

Loss of a token: sum over the ids of p sg[log p - log q], plus, when the sampled token y is none of
them, rho(y) sg[log p(y) - log q(y)] with rho = p / sg p. Its expectation over y is the full reverse
KL and its expected gradient the exact one, for every k; k trades the variance of the sampled token
against the cost of the ids. (Were the head differentiated through its own log p too, the expected
gradient would gain that of the head's mass, which the sampled part does not give back.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opdctl.config.schema import key
from opdctl.config.settings import ON_TOP, ObjectiveConfig
from opdctl.errors import Problem
from opdctl.protocols import Objective
from opdctl.scoring.columns import PAIR_WEIGHT


class TopkTail(Objective):
    """Reverse KL, exact on the top k and sampled outside: unbiased for the full gradient."""

    revision = 1
    needs = ()  # all depend on its keys
    rows = "prediction"
    on_policy_only = True

    @dataclass(kw_only=True)
    class Config(ObjectiveConfig):
        """The keys of topk_tail."""

        support: Literal["topk_student", "topk_teacher", "topk_union"] = key(
            "topk_student", "whose k most probable ids"
        )
        k: int = key(16, "ids of the support", least=1)

    @staticmethod
    def problems(config, stage) -> list[Problem]:
        """The sampled part holds for rollouts of the policy as it is."""
        if stage.epochs * stage.minibatches == 1:
            return []
        message = "after the first update the rollouts are no longer the policy's own"
        return [Problem("", message, "epochs=1 and minibatches=1, or divergence")]

    @staticmethod
    def needs_for(config) -> tuple[str, ...]:
        """Return what its support asks of a teacher."""
        return ON_TOP[config.support]

    @staticmethod
    def kl_direction(config) -> str:
        """Return the direction of the KL to the teacher whose gradient it has."""
        return "reverse"

    def __init__(self, config) -> None:
        self.config, self.needs = config, self.needs_for(config)
        self.compares = config.k  # of as many ids it can log the overlap

    def loss(self, view):
        """Return the loss of each token. Shape [C]; its value is an unbiased estimate of the
        divergence and may be negative."""
        import torch

        top = view.topk(self.config.support, self.config.k)
        there_CK = top.keep_CK & (top.logp_CK.detach().exp() > 0)  # 0 log 0 is 0
        gap_CK = torch.where(there_CK, top.logp_CK.detach() - top.logq_CK, 0.0)
        head_C = (top.logp_CK.exp() * gap_CK).sum(-1)
        logprob_C = view.logprob_C.detach()
        tail_C = (view.logprob_C - logprob_C).exp() * (logprob_C - top.teacher_C)
        value_C = head_C + torch.where(top.holds_C, 0.0, tail_C)
        view.require_finite(value_C, "objectives: {divergence: {direction: forward}}, or jsd")
        view.log("divergence_estimate", value_C)
        return value_C * view[PAIR_WEIGHT]
