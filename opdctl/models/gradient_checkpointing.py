"""Gradient checkpointing: the activations of a layer are computed again in the backward pass.

transformers does so in layers whose ``training`` flag is set. Here no module trains in that sense,
since dropout would make another policy than the one that sampled. So the flag of a layer is set
only when a pass that needs a gradient calls it, and unset again inside, where OPT and Falcon read
it to decide on dropout.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from opdctl.errors import UsageError


def enable_checkpointing(net: Any, name: str) -> None:
    """Turn gradient checkpointing on for all layers of a model.

    Args:
        name: the model's name, for messages.

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
    layers: list[Any] = [m for m in net.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        again = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = functools.partial(_checkpointed_forward, layer, again)


def _checkpointed_forward(
    layer: Any, again: Callable[..., Any], forward: Callable[..., Any], *args: Any
) -> Any:
    """Run a layer's forward, now and again in the backward pass, with its training flag unset."""

    def without_flag(*args: Any) -> Any:
        flag, layer.training = layer.training, False
        try:
            return forward(*args)
        finally:
            layer.training = flag

    return again(without_flag, *args)


@contextlib.contextmanager
def checkpointing(net: nn.Module) -> Iterator[None]:
    """Set the layers' training flags during the forward of a pass that needs a gradient."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in net.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training = True  # not train(): what is inside it stays as it is
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
