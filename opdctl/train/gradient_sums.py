"""Sums of gradients over micro-batches in fp32, whatever the type of the parameters.

bfloat16 keeps 8 bits: a sum of many small gradients in it loses the small ones beside the large,
5 % of the gradient with 512 micro-batches, where rounding once loses .4 % at most. So each
micro-batch's gradient of a narrow parameter is taken from it as soon as it is complete, and added
to an fp32 sum; at the end the parameter gets the sum, rounded once. Four bytes a parameter while
gradients are summed in place of two, which estimate/memory.py counts. Parameters that have fp32
copies sum there (models/master_weights.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

from opdctl.models.model import Model


@contextlib.contextmanager
def wide_sums(model: Model, passes: int) -> Iterator[None]:
    """Sum the gradients of ``passes`` backward passes in at least fp32 within the block.

    One pass needs no sum, and parameters of fp32 or wider sum in their own type.
    """
    narrow = [p for p in model.trainable_parameters().values() if p.dtype.itemsize < 4]
    if passes < 2 or not narrow:
        yield
        return
    sums: dict[Tensor, Tensor] = {}

    def take(parameter: Tensor) -> None:
        assert parameter.grad is not None, "autograd calls this once a gradient is there"
        grad = parameter.grad.float()
        sums[parameter] = sums[parameter].add_(grad) if parameter in sums else grad
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(take) for p in narrow]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for parameter in list(sums):  # one at a time: each sum is freed as its parameter gets it
        parameter.grad = sums.pop(parameter).to(parameter.dtype)
