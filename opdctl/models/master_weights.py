"""Master weights: fp32 copies of bfloat16 parameters, which the optimizer moves.

bfloat16 keeps 8 bits of a weight, and AdamW moves it by about lr: small steps are rounded away
(``graph.py`` has the measurement). Here forward and backward stay in bfloat16, so that sampler,
trainer and teachers compute alike; gradients are summed over micro-batches in fp32, the step is
taken on the fp32 copy, and the parameter is that copy rounded. The usual scheme of Megatron and
DeepSpeed; it costs four bytes a parameter, and four for a gradient. Not autocast: its norms and
residuals have other types than a bfloat16 teacher's, and a teacher equal to the student would not
score zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class MasterWeights:
    """The fp32 copies of a model's trained parameters.

    Attributes:
        named: the copies by parameter name; ``.grad`` is the fp32 sum of a step's gradients.
    """

    def __init__(self, net: torch.nn.Module) -> None:
        self.parameters = {n: p for n, p in net.named_parameters() if p.requires_grad}
        self.named = {n: p.detach().float().clone() for n, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(self._take(self.named[name]))

    @staticmethod
    def _take(master: Tensor) -> Any:
        """Return a hook that moves a gradient from its parameter to the master's sum."""

        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None, "the hook runs when it has been added to"
            grad = parameter.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            parameter.grad = None

        return take

    @torch.no_grad()
    def publish(self) -> None:
        """Set every parameter to its master, rounded."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.named[name])
