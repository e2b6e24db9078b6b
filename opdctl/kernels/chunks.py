"""The head and the loss, a chunk of tokens at a time, in bounded memory.

The gradient of a chunk is formed in the forward pass and its logits are overwritten by the next
chunk's, so no tensor of size tokens x vocabulary ever exists. What backward needs is the gradient
of the hidden rows and of the head, both complete by then. Any objective runs in it: it sees
per-token numbers of a chunk (kernels/chunked.py), or its hidden rows, and returns one loss per
token. Where no objective reads logits the head is left alone: no product with it, no buffer for
what comes out of it, no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from opdctl.kernels.head import Head, HeadGrad

ChunkLoss = Callable[["Chunk", slice], Tensor]


class ScalarRows:
    """The logits as they are, one leaf: for a head that scores and has no vocabulary."""

    name = "raw"

    def __init__(self, logits_CV: Tensor, operand: torch.dtype | None = None) -> None:
        self.score_C = logits_CV[:, 0].clone().requires_grad_()
        self.leaves = [self.score_C]

    def gradient(self, grads: list[Tensor | None]) -> tuple[Tensor, Tensor | None]:
        assert grads[0] is not None, "its one leaf is the score"
        return grads[0][:, None], None


class Chunk:
    """A chunk of the backbone's rows; their logits are made when an objective first asks for them.

    Args:
        buffer_CV: for the logits; None where no objective declares that it reads them.
        inner_CLD: the same rows of layers before the last, if any are asked for.
    """

    def __init__(
        self,
        hidden_CD: Tensor,
        head: Head,
        rows_of: type,
        buffer_CV: Tensor | None,
        inner_CLD: Tensor | None = None,
    ) -> None:
        self._input_CD, self.head, self._rows_of = hidden_CD.detach(), head, rows_of
        self._buffer_CV = None if buffer_CV is None else buffer_CV[: len(hidden_CD)]
        self._inner_CLD = inner_CLD

    @cached_property
    def rows(self) -> Any:
        """The row pass over the logits."""
        assert self._buffer_CV is not None, "an objective that reads logits says so by its needs"
        logits_CV = self.head.logits(self._input_CD, self._buffer_CV)
        self._slope_CV = self.head.slope(logits_CV)
        return self._rows_of(logits_CV, self.head.operand)

    @cached_property
    def hidden_CD(self) -> Tensor:
        """The hidden rows themselves, a leaf."""
        return self._input_CD.clone().requires_grad_()

    @cached_property
    def inner_CLD(self) -> Tensor:
        """The states of the inner layers that are compared, a leaf."""
        assert self._inner_CLD is not None, "an objective that compares layers says so by its needs"
        return self._inner_CLD.detach().clone().requires_grad_()

    def backward(
        self, loss: Tensor, out_CD: Tensor, grad: HeadGrad, inner_out_CLD: Tensor | None = None
    ) -> None:
        """Take the gradient of the chunk's loss: of its hidden rows written, of the head added."""
        leaves = list(self.rows.leaves) if "rows" in vars(self) else []
        count = len(leaves)
        own = {"hidden_CD": out_CD, "inner_CLD": inner_out_CLD}
        own = {name: out for name, out in own.items() if name in vars(self)}
        leaves += [getattr(self, name) for name in own]
        grads = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else ()
        out_CD.zero_()
        if any(g is not None for g in grads[:count]):
            dlogits_CV, factor_C = self.rows.gradient(list(grads[:count]))
            self.head.adjoint(dlogits_CV, factor_C, self._slope_CV, self._input_CD, out_CD, grad)
        if inner_out_CLD is not None:
            inner_out_CLD.zero_()
        for out, state_grad in zip(own.values(), grads[count:], strict=bool(grads)):
            if state_grad is not None:
                out += state_grad


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss_of, head, rows_of, size, reads_logits, hidden_ND, inner_NLD, *parameters):
        count = -(-len(hidden_ND) // size)
        size = max(1, -(-len(hidden_ND) // max(1, count)))  # as even as can be
        grad_ND, grad, buffer_CV = torch.empty_like(hidden_ND), HeadGrad(None, None), None
        grad_NLD = None if inner_NLD is None else torch.empty_like(inner_NLD)
        total = hidden_ND.new_zeros((), dtype=head.logits_dtype)
        if reads_logits:
            grad = head.new_grad()
            buffer_CV = hidden_ND.new_empty(size, head.valid_V, dtype=head.logits_dtype)
        for start in range(0, len(hidden_ND), size):
            part = slice(start, min(start + size, len(hidden_ND)))
            inner_CLD = None if inner_NLD is None else inner_NLD[part]
            chunk = Chunk(hidden_ND[part], head, rows_of, buffer_CV, inner_CLD)
            with torch.enable_grad():
                loss = loss_of(chunk, part).sum()
            inner_out_CLD = None if grad_NLD is None else grad_NLD[part]
            chunk.backward(loss, grad_ND[part], grad, inner_out_CLD)
            total += loss.detach()
        ctx.save_for_backward(grad_ND, grad_NLD)
        ctx.head = [grad.weight_VD, grad.bias_V][: len(parameters)]
        ctx.types = [p.dtype for p in parameters]
        return total

    @staticmethod
    def backward(ctx, *grad_outputs):
        (upstream,) = grad_outputs
        if ctx.head is None:
            raise RuntimeError("the gradient of a chunked loss can be taken once")
        grads = ctx.saved_tensors  # of the hidden rows, and of the inner ones if there are any
        head, ctx.head = ctx.head, None
        for g in head:
            if g is not None and upstream != 1:
                g.mul_(upstream)
        head = [None if g is None else g.to(t) for g, t in zip(head, ctx.types, strict=True)]
        rows = [g if g is None or upstream == 1 else g * upstream.to(g.dtype) for g in grads]
        return None, None, None, None, None, *rows, *head


def chunked_sum(
    loss_of: ChunkLoss,
    hidden_ND: Tensor,
    head: Head,
    rows_of: type,
    size: int,
    reads_logits: bool = True,
    inner_NLD: Tensor | None = None,
) -> Tensor:
    """Return the sum of ``loss_of(chunk, slice)`` over chunks of at most ``size`` rows.

    Args:
        loss_of: returns the loss of each row, [C], a function of the chunk's leaves.
        hidden_ND: rows of the backbone.
        head: makes the logits; its parameters that require a gradient get one.
        rows_of: the level of the row pass, see kernels/select.py.
        reads_logits: False leaves the head without a product and without a gradient.
        inner_NLD: rows of layers before the last, for objectives that compare them.

    Returns:
        The sum, a scalar in at least fp32; its backward costs no second pass over the vocabulary
        and can be run once.
    """
    parameters = [p for p in (head.weight_VD, head.bias_V) if p is not None]
    arguments = (loss_of, head, rows_of, size, reads_logits, hidden_ND, inner_NLD)
    return _Chunked.apply(*arguments, *(parameters if reads_logits else ()))


def rows_in(mebibytes: int, head: Head, states: int = 0, reads_logits: bool = True) -> int:
    """Return the rows whose two buffers of logits, and what a level needs beside, fit the memory.

    0 is 256 MiB on a CPU, whose cache likes small chunks, and 3 GiB on a GPU, where every chunk
    costs a pass over the head's gradient.

    Args:
        states: hidden states compared for each row, of which about eight copies are at hand.
        reads_logits: whether there are logits at all.
    """
    mebibytes = mebibytes or (3072 if head.weight_VD.is_cuda else 256)
    numbers = 8 * states * head.weight_VD.shape[1] + (3 * head.valid_V if reads_logits else 0)
    return max(1, (mebibytes << 20) // (max(1, numbers) * head.logits_dtype.itemsize))
