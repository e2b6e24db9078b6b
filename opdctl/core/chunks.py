"""The head and the loss, a chunk of tokens at a time, in bounded memory.

The gradient of a chunk is formed in the forward pass and its logits are overwritten by the next
chunk's, so no tensor of size tokens x vocabulary ever exists. What backward needs is the gradient
of the hidden rows and of the head, both complete by then. Any objective runs in it: it sees
per-token numbers of a chunk (kernels/chunked.py), or its hidden rows, and returns one loss per
token. The head is not read where no objective asks for what comes out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from opdctl.kernels.head import Head, HeadGrad

ChunkLoss = Callable[["Chunk", slice], Tensor]


class Raw:
    """Logits as they are, one leaf: for a head that scores and has no vocabulary."""

    name = "raw"

    def __init__(self, logits_CV: Tensor, operand: torch.dtype | None = None) -> None:
        self.score_C = logits_CV[:, 0].clone().requires_grad_()
        self.leaves = [self.score_C]

    def gradient(self, grads: list[Tensor | None]) -> tuple[Tensor, Tensor | None]:
        return grads[0][:, None], None


class Chunk:
    """Some rows of the trunk; their logits are made when an objective first asks for them."""

    def __init__(self, hidden_CD: Tensor, head: Head, rows_of: type, buffer_CV: Tensor) -> None:
        self._input_CD, self._head, self._rows_of = hidden_CD.detach(), head, rows_of
        self._buffer_CV = buffer_CV[: len(hidden_CD)]

    @cached_property
    def rows(self) -> Any:
        """The row pass over the logits."""
        logits_CV = self._head.logits(self._input_CD, self._buffer_CV)
        self._slope_CV = self._head.slope(logits_CV)
        return self._rows_of(logits_CV, self._head.operand)

    @property
    def width(self) -> int:
        """Width of a hidden row."""
        return self._input_CD.shape[-1]

    @cached_property
    def hidden_CD(self) -> Tensor:
        """The hidden rows themselves, a leaf."""
        return self._input_CD.clone().requires_grad_()

    def backward(self, loss: Tensor, out_CD: Tensor, grad: HeadGrad) -> None:
        """Gradient of the chunk's loss: of its hidden rows written, of the head added."""
        leaves = list(self.rows.leaves) if "rows" in vars(self) else []
        given = len(leaves)
        leaves += [self.hidden_CD] if "hidden_CD" in vars(self) else []
        grads = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else ()
        out_CD.zero_()
        if any(g is not None for g in grads[:given]):
            dlogits_CV, factor_C = self.rows.gradient(list(grads[:given]))
            self._head.adjoint(dlogits_CV, factor_C, self._slope_CV, self._input_CD, out_CD, grad)
        for own_CD in grads[given:]:
            if own_CD is not None:
                out_CD += own_CD


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss_of, head, rows_of, size, hidden_ND, *parameters):
        count = -(-len(hidden_ND) // size)
        size = max(1, -(-len(hidden_ND) // max(1, count)))  # as even as can be
        grad_ND, grad = torch.empty_like(hidden_ND), head.new_grad()
        total = hidden_ND.new_zeros((), dtype=head.wide)
        buffer_CV = hidden_ND.new_empty(size, head.valid_V, dtype=head.wide)
        for start in range(0, len(hidden_ND), size):
            part = slice(start, min(start + size, len(hidden_ND)))
            chunk = Chunk(hidden_ND[part], head, rows_of, buffer_CV)
            with torch.enable_grad():
                loss = loss_of(chunk, part).sum()
            chunk.backward(loss, grad_ND[part], grad)
            total += loss.detach()
        ctx.save_for_backward(grad_ND)
        ctx.head = [grad.weight_VD, grad.bias_V][: len(parameters)]
        ctx.types = [p.dtype for p in parameters]
        return total

    @staticmethod
    def backward(ctx, upstream):
        if ctx.head is None:
            raise RuntimeError("the gradient of a chunked loss can be taken once")
        (grad_ND,) = ctx.saved_tensors
        head, ctx.head = ctx.head, None
        for g in head:
            if g is not None and upstream != 1:
                g.mul_(upstream)
        head = [None if g is None else g.to(t) for g, t in zip(head, ctx.types, strict=True)]
        return None, None, None, None, grad_ND * upstream.to(grad_ND.dtype), *head


def chunked_sum(
    loss_of: ChunkLoss, hidden_ND: Tensor, head: Head, rows_of: type, size: int
) -> Tensor:
    """Sum of ``loss_of(chunk, slice)`` over chunks of at most ``size`` rows.

    Args:
        loss_of: returns the loss of each row, [C], a function of the chunk's leaves.
        hidden_ND: rows of the trunk.
        head: makes the logits; its parameters that require a gradient get one.
        rows_of: the level of the row pass, see kernels/select.py.

    Returns:
        The sum, a scalar in at least fp32; its backward costs no second pass over the vocabulary
        and can be run once.
    """
    parameters = [p for p in (head.weight_VD, head.bias_V) if p is not None]
    return _Chunked.apply(loss_of, head, rows_of, size, hidden_ND, *parameters)


def rows_in(mebibytes: int, head: Head) -> int:
    """Rows whose two buffers of logits and what a level needs beside them fit the memory given.

    0 is 256 MiB on a CPU, whose cache likes small chunks, and 3 GiB on a GPU, where every chunk
    costs a pass over the head's gradient.
    """
    mebibytes = mebibytes or (3072 if head.weight_VD.is_cuda else 256)
    return max(1, (mebibytes << 20) // (head.valid_V * head.wide.itemsize * 3))
