"""Gradient checkpointing: the activations of a layer are computed again in the backward pass.

transformers does so in layers that say they are training. Here nothing ever is, since dropout
would make another policy than the one that sampled; so a layer says so only when a pass that needs
a gradient calls it, and no longer inside (OPT's and Falcon's look there whether to drop).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

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
    if hasattr(net, "activation_checkpointing_enable"):  # newer name
        net.activation_checkpointing_enable({"use_reentrant": False})
    else:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in net.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            again = layer._gradient_checkpointing_func
            layer._gradient_checkpointing_func = functools.partial(_inside, layer, again)


def _inside(layer: Any, again: Callable[..., Any], forward: Callable[..., Any], *args: Any) -> Any:
    """A layer's forward, now and again, in which the layer does not say that it is training."""

    def quiet(*args: Any) -> Any:
        said, layer.training = layer.training, False
        try:
            return forward(*args)
        finally:
            layer.training = said

    return again(quiet, *args)


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
