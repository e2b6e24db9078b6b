"""Exact divergence over the whole vocabulary between the student and the token's own teacher.

    reverse   KL(p || q), gradient p (log p - log q - KL): DeepSeek-V4 (arXiv 2606.19348) Eq. 29
    forward   KL(q || p), gradient p - q
    jsd       beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p: GKD (2306.13649)

p is the student, q the teacher, both at the sampling temperature. The jsd of beta 0 or 1 is 0 by
its formula; as in TRL those two mean forward and reverse KL, a jump that is theirs and kept.
Each is summed as p r - p + q, which is never negative term by term, so a divergence is reported
non-negative by construction. Leaves out top-k supports.

    opdctl stage opd --student DIR --teacher math=DIR 'objectives={divergence: {}}' 'signals={}'
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opdctl.schema import key
from opdctl.settings import ObjectiveConfig


class Divergence:
    """Full-vocabulary reverse KL, forward KL or JSD to the teacher of each token."""

    revision = 1
    needs = ("teacher.hidden",)
    rows = "prediction"

    @dataclass(kw_only=True)
    class Config(ObjectiveConfig):
        """Keys of divergence."""

        direction: Literal["reverse", "forward", "jsd"] = key("reverse", "student first is reverse")
        beta: float = key(0.5, "weight of the teacher in jsd's mixture", least=0, most=1)

    def __init__(self, config) -> None:
        self.config = config

    def loss(self, view):
        """Shape [C]."""
        import torch

        log_p_CV = view.logits_CV[:, : view.model.valid_V].log_softmax(-1)
        log_q_CV = view.teacher_logits_CV.log_softmax(-1)
        direction, beta = self.config.direction, self.config.beta
        if direction == "jsd":
            direction = {0.0: "forward", 1.0: "reverse"}.get(beta, "jsd")
        if direction == "reverse":
            value_C = kl(log_p_CV, log_q_CV)
        elif direction == "forward":
            value_C = kl(log_q_CV, log_p_CV)
        else:
            weights = torch.tensor([1 - beta, beta], dtype=log_p_CV.dtype).log().tolist()
            log_m_CV = torch.logaddexp(log_p_CV + weights[0], log_q_CV + weights[1])
            value_C = beta * kl(log_q_CV, log_m_CV) + (1 - beta) * kl(log_p_CV, log_m_CV)
        view.log("divergence", value_C)
        with torch.no_grad():
            view.log("entropy", -(log_p_CV.exp() * log_p_CV).sum(-1))
            view.log("teacher_entropy", -(log_q_CV.exp() * log_q_CV).sum(-1))
        return value_C * view["teacher_weight"]


def kl(log_a_CV, log_b_CV):
    """sum a (log a - log b) - a + b: KL(a || b) of normalised a and b, non-negative. Shape [C]."""
    a_CV = log_a_CV.exp()
    return (a_CV * (log_a_CV - log_b_CV) - a_CV + log_b_CV.exp()).sum(-1)
