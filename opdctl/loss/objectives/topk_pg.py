"""Policy gradient over k candidate tokens of a prefix instead of the one that was sampled.

Loss of a token: -sum over the ids of w(v) A(v) rho(v), A = sg[log q - log p], rho = p / sg p: the
top-k form of arXiv 2604.13016. With w = p renormalised on the ids its gradient is the reverse-KL
gradient's part from them, over their mass; it also moves mass in and out of the ids. Biased for
k < V, the exact gradient at k = V. Leaves out PPO's clip per candidate: the ratio is always one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opdctl.config.schema import key
from opdctl.config.settings import ON_TOP, ObjectiveConfig
from opdctl.protocols import Objective
from opdctl.scoring.columns import PAIR_WEIGHT


class TopkPg(Objective):
    """Policy gradient over the k most probable tokens, weighted by a side's probabilities."""

    revision = 1
    needs = ()  # all depend on its keys
    rows = "prediction"

    @dataclass(kw_only=True)
    class Config(ObjectiveConfig):
        """The keys of topk_pg."""

        support: Literal["topk_student", "topk_teacher", "topk_union"] = key(
            "topk_student", "whose k most probable ids"
        )
        k: int = key(16, "ids of the support", least=1)
        weighting: Literal["student", "teacher", "none"] = key(
            "student", "weight of a candidate: p or q renormalised on the ids, or 1"
        )

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
        """Return the loss of each token. Shape [C]; its value is the weighted log-ratio at p =
        p_old."""
        import torch

        top = view.topk(self.config.support, self.config.k)
        old_CK = top.logp_CK.detach()
        by = {"student": old_CK, "teacher": top.logq_CK, "none": None}[self.config.weighting]
        if by is None:
            weight_CK = top.keep_CK.to(old_CK.dtype)
        else:
            weight_CK = by.masked_fill(~top.keep_CK, -torch.inf).softmax(-1)
        # 0 log 0 is 0: an id without weight adds nothing, whatever its advantage
        advantage_CK = torch.where(weight_CK > 0, top.logq_CK - old_CK, 0.0)
        advantage_C = (weight_CK * advantage_CK).sum(-1)
        view.require_finite(advantage_C, "weighting: teacher, or objectives: {divergence: ...}")
        view.log("topk_advantage", advantage_C)
        ratio_CK = (top.logp_CK - old_CK).exp()
        return -(weight_CK * advantage_CK * ratio_CK).sum(-1) * view[PAIR_WEIGHT]
