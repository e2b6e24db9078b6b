"""The definitions, materialised and differentiated by autograd: what the other levels must equal.

    reverse   KL(p || q)                       p the student, q the teacher
    forward   KL(q || p)
    jsd       b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p  (GKD, arXiv 2306.13649)

The jsd of b = 0 or 1 is 0 by its formula; as in TRL those two mean forward and reverse KL, a jump
that is theirs and kept: b = .01 gives a loss about a hundred times smaller than b = 0.

A side may have no mass at an id, a log-mass of -inf, as a teacher of a part of the vocabulary has:
0 log 0 is 0. So an id without mass under q adds nothing to the forward KL but what the student has
there, in a jsd that share times log 1 / (1 - b), and the reverse KL is infinite by its formula as
soon as the student has any. Infinite values are returned as such; loss/token_view.py refuses them.

Works on any vectors of log-mass, so the top-k forms (kernels/topk.py) use it in production.
Forced on the whole vocabulary with ``runtime.kernel=reference``; it then keeps several tensors of
chunk x vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

SERIES = (1 / 2, -1 / 6, 1 / 24, -1 / 120)  # of (e^-r - 1 + r) / r^2
ABSENT = -1e4  # a log-mass whose exponential is 0 in every precision, without 0 x infinity
GONE = ABSENT / 2  # below it there is no mass: a type's least number is above e^-750


def near(dtype: torch.dtype) -> float:
    """Return |r| below which the series is the more exact; above it, a (r - 1) + b is safely
    positive."""
    return 1e-3 if dtype == torch.float64 else 0.125


def kl(log_a_CV: Tensor, log_b_CV: Tensor) -> Tensor:
    """Return sum a r - a + b with r = log a - log b, over the last axis. Shape [C].

    KL(a || b) where both sum to one, the generalised KL where they do not. Each term is
    a (e^-r - 1 + r) >= 0; near r = 0 it is summed as a series, a r^2 times something positive, so
    no term is negative in any precision and none is lost to cancellation.
    """
    log_a_CV, log_b_CV = log_a_CV.clamp(min=ABSENT), log_b_CV.clamp(min=ABSENT)
    return _kl(log_a_CV.exp(), log_b_CV.exp(), log_a_CV - log_b_CV)


def _kl(a_CV: Tensor, b_CV: Tensor, r_CV: Tensor) -> Tensor:
    close_CV = r_CV.abs() < near(r_CV.dtype)
    small_CV = torch.where(close_CV, r_CV, 0.0)
    series_CV = sum(c * small_CV**i for i, c in enumerate(SERIES)) * small_CV**2
    far_CV = a_CV * (r_CV - 1) + b_CV
    far_CV = far_CV.masked_fill((r_CV > -GONE) & (a_CV > 0), torch.inf)  # a > 0 where b is 0
    return torch.where(close_CV, a_CV * series_CV, far_CV).sum(-1)


def entropy(log_p_CV: Tensor) -> Tensor:
    """Return -sum p log p; ids without mass add nothing. Shape [C]."""
    log_p_CV = log_p_CV.clamp(min=ABSENT)
    return -(log_p_CV.exp() * log_p_CV).sum(-1)


def endpoint(direction: str, beta: float) -> str:
    """The direction that a jsd of beta 0 or 1 means."""
    return {0.0: "forward", 1.0: "reverse"}.get(beta, "jsd") if direction == "jsd" else direction


def divergence(log_p_CV: Tensor, log_q_CV: Tensor, direction: str, beta: float = 0.5) -> Tensor:
    """Return reverse KL, forward KL or JSD of two log-masses. Shape [C]."""
    direction = endpoint(direction, beta)
    if direction == "reverse":
        return kl(log_p_CV, log_q_CV)
    if direction == "forward":
        return kl(log_q_CV, log_p_CV)
    log_p_CV, log_q_CV = log_p_CV.clamp(min=ABSENT), log_q_CV.clamp(min=ABSENT)
    p_CV, q_CV = log_p_CV.exp(), log_q_CV.exp()
    r_CV = (log_p_CV - log_q_CV).clamp(min=-80.0)  # where q is e^80 times p, p adds nothing
    a_CV = -torch.log1p(beta * torch.expm1(-r_CV))  # log p - log m
    m_CV = torch.lerp(p_CV, q_CV, beta)
    return beta * _kl(q_CV, m_CV, a_CV - r_CV) + (1 - beta) * _kl(p_CV, m_CV, a_CV)


class Rows:
    """A chunk of the student's logits; see kernels/chunked.py for what each method means."""

    name = "reference"

    def __init__(self, logits_CV: Tensor, operand: torch.dtype | None = None) -> None:
        self.logits_CV = logits_CV.requires_grad_()
        with torch.enable_grad():
            self.logp_CV = self.logits_CV.log_softmax(-1)
        self.leaves = [self.logits_CV]

    def at(self, ids_CK: Tensor, leaf: bool = True) -> Tensor:
        return (self.logp_CV if leaf else self.logp_CV.detach()).gather(-1, ids_CK)

    def outside(self, ids_CK: Tensor) -> Tensor:
        mask_CV = torch.ones_like(self.logp_CV).scatter_(-1, ids_CK, 0.0)
        mass_C = (self.logp_CV.exp() * mask_CV).sum(-1)
        return mass_C.clamp(min=torch.finfo(mass_C.dtype).tiny).log()

    def entropy(self) -> Tensor:
        return entropy(self.logp_CV.detach())

    def top(self, k: int) -> Tensor:
        return self.logp_CV.detach().topk(k, dim=-1).indices

    def divergence(self, teacher_CV: Tensor, direction: str, beta: float, ids_CK: Tensor):
        log_q_CV = teacher_CV.log_softmax(-1)
        value_C = divergence(self.logp_CV, log_q_CV, direction, beta)
        return value_C, entropy(log_q_CV), log_q_CV.gather(-1, ids_CK)

    def gradient(self, grads: list[Tensor | None]) -> tuple[Tensor, Tensor | None]:
        assert grads[0] is not None, "its one leaf is the logits"
        return grads[0], None
