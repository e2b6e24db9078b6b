"""The row pass in torch: a chunk of logits becomes log-probs, per-token numbers and, in place,
the gradient. The path of every CPU, and of a GPU without Triton.

An objective sees only per-token numbers of a chunk: log-probs at some ids, a divergence. They are
leaves of autograd, so what it does with them is a graph over [C] and never over [C, V]; the
gradient with respect to a leaf then scales a gradient with respect to the logits that is known in
closed form:

    log p(v)   1[u = v] - p(u)
    log of the mass outside some ids   p(u) 1[u outside] / mass - p(u)
    reverse    p (r - sum p r),               r = log p - log q
    forward    p - q
    jsd        (1 - b) p (a - sum p a),       a = log p - log m

Two buffers of chunk x vocabulary are used, the logits, which become log-probs and then the
gradient, and the teacher's, which become r, q or a; a mass outside some ids takes a third. An id
may have no mass, a logit of -inf: see kernels/reference.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.linalg import vecdot

from opdctl.kernels.reference import ABSENT, GONE, SERIES, endpoint, near
from opdctl.kernels.topk import log_outside, share_outside

BLOCK = 1 << 16  # elements of a block: with its scratch it stays in a core's cache


class Rows:
    """A chunk of the student's logits, [C, V]; the buffer is overwritten.

    Args:
        operand: the type in which the gradient enters its products, if the level makes use of it.

    Attributes:
        leaves: what objectives were given; gradients with respect to them go to ``gradient``.
    """

    name = "chunked"

    def __init__(self, logits_CV: Tensor, operand: torch.dtype | None = None) -> None:
        self.logp_CV = torch.log_softmax(logits_CV, -1, out=logits_CV)
        self.leaves: list[Tensor] = []
        self._ids: list[Tensor | int | None] = []  # of each leaf; None is the divergence
        self._tails: list[tuple[Tensor, Tensor]] = []  # a number among the ids is one of these
        self._scratch: list[Tensor] = []
        self._entropy_C: Tensor | None = None

    def at(self, ids_CK: Tensor, leaf: bool = True) -> Tensor:
        """Return log-probs at ids; a leaf, or without a gradient. Shape [C, K]."""
        logp_CK = self.logp_CV.gather(-1, ids_CK)
        return self._leaf(logp_CK, ids_CK) if leaf else logp_CK

    def outside(self, ids_CK: Tensor) -> Tensor:
        """Return the log of the mass on all but some ids, a leaf. Shape [C]."""
        outside_C = log_outside(self.logp_CV, ids_CK)
        self._tails.append((ids_CK, outside_C.detach().clone()))
        return self._leaf(outside_C, len(self._tails) - 1)

    def top(self, k: int) -> Tensor:
        """Return the ids of the k most probable tokens. Shape [C, k]."""
        return self.logp_CV.topk(k, dim=-1).indices

    def entropy(self) -> Tensor:
        """Return the entropy. Shape [C]; no gradient."""
        if self._entropy_C is None:
            self._entropy_C = self.logp_CV.new_zeros(len(self.logp_CV))
            for rows, cols in blocks(self.logp_CV.shape):
                logp_BV = self._present(self.logp_CV[rows, cols])
                self._entropy_C[rows] -= vecdot(self._exp(logp_BV, 0), logp_BV)
        return self._entropy_C

    def divergence(self, teacher_CV: Tensor, direction: str, beta: float, ids_CK: Tensor):
        """Return the divergence to the teacher over the whole vocabulary.

        Args:
            teacher_CV: the teacher's logits; the buffer is overwritten.

        Returns:
            The divergence, a leaf, [C]; the teacher's entropy, [C]; its log-probs at ids, [C, K].
        """
        logp_CV, self._other_CV = self.logp_CV, torch.log_softmax(teacher_CV, -1, out=teacher_CV)
        logq_CK = self._other_CV.gather(-1, ids_CK)
        self._direction, self._beta = endpoint(direction, beta), beta
        zeros = [logp_CV.new_zeros(len(logp_CV)) for _ in range(4)]
        value_C, teacher_C, self._mean_C, self._entropy_C = zeros
        for rows, cols in blocks(logp_CV.shape):
            logp_BV = self._present(logp_CV[rows, cols])
            other_BV = self._other_CV[rows, cols].clamp_(min=ABSENT)
            p_BV, q_BV = self._exp(logp_BV, 0), self._exp(other_BV, 1)
            self._entropy_C[rows] -= vecdot(p_BV, logp_BV)
            teacher_C[rows] -= vecdot(q_BV, other_BV)
            r_BV = torch.sub(logp_BV, other_BV, out=other_BV)
            if self._direction == "forward":
                value_C[rows] += self._kl(q_BV, p_BV, r_BV.neg_())
                other_BV.copy_(q_BV)
            elif self._direction == "reverse":
                value_C[rows] += self._kl(p_BV, q_BV, r_BV)
                self._mean_C[rows] += vecdot(p_BV, r_BV)
            else:
                value_C[rows] += self._jsd(p_BV, q_BV, r_BV)
                self._mean_C[rows] += vecdot(p_BV, r_BV)
        return self._leaf(value_C, None), teacher_C, logq_CK

    def gradient(self, grads: list[Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """Return the gradient of the logits, [C, V], from the leaves'; overwrites both buffers.

        Returns:
            It, and a factor of its rows that is left to the products, [C], or None.
        """
        out_CV, weight_C, outside_CV = self.logp_CV, None, None
        picked_C = out_CV.new_zeros(len(out_CV))
        for ids_CK, grad in zip(self._ids, grads, strict=True):
            if grad is None:
                continue
            if ids_CK is None:
                weight_C = grad
            elif isinstance(ids_CK, int):
                picked_C -= grad
                share_CV = share_outside(out_CV, *self._tails[ids_CK]).mul_(grad[:, None])
                outside_CV = share_CV if outside_CV is None else outside_CV.add_(share_CV)
            else:
                picked_C -= grad.sum(-1)
        if weight_C is None:
            out_CV.exp_().mul_(picked_C[:, None])
        else:
            self._full(out_CV, weight_C, picked_C)
        for ids_CK, grad in zip(self._ids, grads, strict=True):
            if isinstance(ids_CK, Tensor) and grad is not None:
                out_CV.scatter_add_(-1, ids_CK, grad)
        if outside_CV is not None:
            out_CV += outside_CV
        return out_CV, None

    def _full(self, out_CV: Tensor, weight_C: Tensor, picked_C: Tensor) -> None:
        """Return p x (weight x (r - mean) + picked), or weight x (p - q) + picked x p, in place."""
        forward = self._direction == "forward"
        if self._direction == "jsd":
            weight_C = weight_C * (1 - self._beta)
        shift_C = picked_C + weight_C if forward else picked_C - weight_C * self._mean_C
        for rows, cols in blocks(out_CV.shape):
            p_BV, other_BV = out_CV[rows, cols].exp_(), self._other_CV[rows, cols]
            weight_B1, shift_B1 = weight_C[rows, None], shift_C[rows, None]
            if forward:
                p_BV.mul_(shift_B1).sub_(other_BV.mul_(weight_B1))
            else:
                p_BV.mul_(other_BV.mul_(weight_B1).add_(shift_B1))

    def _jsd(self, p_BV: Tensor, q_BV: Tensor, r_BV: Tensor) -> Tensor:
        """Return the JSD of a block; ``r_BV`` becomes a = log p - log m."""
        b = self._beta
        r_BV.clamp_(min=-80.0)  # where q is e^80 times p, p adds nothing to any sum
        mixed_BV = torch.neg(r_BV, out=self._scratch_like(r_BV, 4)).expm1_().mul_(b)  # m / p - 1
        m_BV = torch.lerp(p_BV, q_BV, b, out=self._scratch_like(r_BV, 5))
        a_BV = mixed_BV.log1p_().neg_()
        value_B = b * self._kl(q_BV, m_BV, torch.sub(a_BV, r_BV, out=r_BV))
        value_B += (1 - b) * self._kl(p_BV, m_BV, a_BV)
        r_BV.copy_(a_BV)
        return value_B

    def _kl(self, a_BV: Tensor, b_BV: Tensor, r_BV: Tensor) -> Tensor:
        """Return ``kernels.reference.kl`` of a block, given r = log a - log b. Shape [B]."""
        series_BV = torch.mul(r_BV, SERIES[3], out=self._scratch_like(r_BV, 2))
        series_BV.add_(SERIES[2]).mul_(r_BV).add_(SERIES[1]).mul_(r_BV).add_(SERIES[0])
        series_BV.mul_(r_BV).mul_(r_BV).mul_(a_BV)
        far_BV = torch.sub(r_BV, 1.0, out=self._scratch_like(r_BV, 3)).mul_(a_BV).add_(b_BV)
        if r_BV.amax() > -GONE:  # b is 0 somewhere: infinite where a is not
            far_BV.masked_fill_((r_BV > -GONE) & (a_BV > 0), torch.inf)
        return torch.where(r_BV.abs() < near(r_BV.dtype), series_BV, far_BV).sum(-1)

    def _leaf(self, value: Tensor, ids_CK: Tensor | int | None) -> Tensor:
        self.leaves.append(value.requires_grad_())
        self._ids.append(ids_CK)
        return value

    def _present(self, logp_BV: Tensor) -> Tensor:
        """Return a block of log-probs in scratch memory, those of ids without mass finite."""
        return torch.clamp(logp_BV, min=ABSENT, out=self._scratch_like(logp_BV, 6))

    def _exp(self, x_BV: Tensor, slot: int) -> Tensor:
        return torch.exp(x_BV, out=self._scratch_like(x_BV, slot))

    def _scratch_like(self, x_BV: Tensor, slot: int) -> Tensor:
        """A block of scratch memory, kept for the whole chunk."""
        while len(self._scratch) <= slot:
            self._scratch.append(x_BV.new_empty(max(BLOCK, x_BV.shape[1])))
        return self._scratch[slot][: x_BV.numel()].view(x_BV.shape)


def blocks(shape: torch.Size) -> Iterator[tuple[slice, slice]]:
    """Return blocks of at most BLOCK elements that cover [C, V], few columns cut."""
    C, V = shape
    wide = min(V, BLOCK // 4)
    high = max(1, BLOCK // wide)
    for row in range(0, C, high):
        for col in range(0, V, wide):
            yield slice(row, row + high), slice(col, col + wide)
