"""The head and the loss, a chunk of tokens at a time, in bounded memory.

The gradient of a chunk is formed in the forward pass and its logits are freed before the next
chunk's are made, so no tensor of size tokens x vocabulary outlives a chunk. What backward needs
is the gradient of the hidden rows and of the head, both complete by then. Any objective runs in
it: it sees logits and returns one loss per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ChunkLoss = Callable[[Tensor, slice], Tensor]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss_of, size, hidden_ND, *head):
        grad_ND = torch.zeros_like(hidden_ND)
        wide = [torch.promote_types(p.dtype, torch.float32) for p in head]
        grads = [
            torch.zeros(p.shape, dtype=w, device=p.device) if p.requires_grad else None
            for p, w in zip(head, wide, strict=True)
        ]
        trained = [p for p in head if p.requires_grad]
        total = hidden_ND.new_zeros((), dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
        for start in range(0, hidden_ND.shape[0], size):
            rows = slice(start, min(start + size, hidden_ND.shape[0]))
            with torch.enable_grad():
                chunk_CD = hidden_ND[rows].detach().requires_grad_()
                loss = loss_of(chunk_CD, rows).sum()
                found = torch.autograd.grad(loss, [chunk_CD, *trained], allow_unused=True)
            total += loss.detach()
            grad_ND[rows] = found[0] if found[0] is not None else 0
            parts = iter(found[1:])
            for i, p in enumerate(head):
                part = next(parts) if p.requires_grad else None
                if part is not None:
                    grads[i] += part
        ctx.save_for_backward(grad_ND)
        ctx.head = [None if g is None else g.to(p.dtype) for g, p in zip(grads, head, strict=True)]
        return total

    @staticmethod
    def backward(ctx, upstream):
        (grad_ND,) = ctx.saved_tensors
        head = [None if g is None else g * upstream.to(g.dtype) for g in ctx.head]
        return None, None, grad_ND * upstream.to(grad_ND.dtype), *head


def chunked_sum(loss_of: ChunkLoss, hidden_ND: Tensor, head: list[Tensor], size: int) -> Tensor:
    """Sum of ``loss_of(hidden rows, slice)`` over chunks of ``size`` rows.

    Args:
        loss_of: differentiable in the hidden rows it is given and in ``head``; returns the loss
            of each row, [C].
        hidden_ND: rows of the trunk.
        head: every parameter ``loss_of`` reads.
        size: rows a chunk.

    Returns:
        The sum, a scalar in at least fp32; its backward costs no second pass over the vocabulary.
    """
    return _Chunked.apply(loss_of, size, hidden_ND, *head)


def rows_in(mebibytes: int, vocab: int, itemsize: int = 4) -> int:
    """Rows whose logits, softmax and gradient fit the memory given."""
    return max(1, (mebibytes << 20) // (vocab * itemsize * 3))
