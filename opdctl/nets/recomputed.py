"""Gradient checkpointing: the activations of a layer are computed again in the backward pass.

transformers does so in modules that say they are training. Here nothing ever is, since dropout
would make another policy than the one that sampled; so the layers alone, and not what is inside
them, are said to be while a pass that needs a gradient goes through them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from opdctl.errors import UsageError


def recompute(net: nn.Module, name: str) -> None:
    """Turn it on.

    Raises:
        UsageError: the architecture has no layers that can be computed again.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not any(isinstance(m, GradientCheckpointingLayer) for m in net.modules()):
        kind = net.config.model_type
        raise UsageError(
            f"{name}: transformers cannot compute layers of {kind} again",
            "runtime.gradient_checkpointing=false",
        )
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@contextlib.contextmanager
def recomputing(net: nn.Module) -> Iterator[None]:
    """For the forward of a pass that needs a gradient."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in net.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training = True  # not train(): what is inside it stays as it is
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
