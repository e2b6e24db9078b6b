"""Hidden states of selected layers, and their counterparts in a model of another depth.

Layers are numbered 1 to L, without the embedding. The state of a layer before the last is the input
of the next layer, before any final norm; the state of the last is the row after the final norm,
which the head reads. These are transformers' own ``hidden_states[1:]``. In a model of another depth
the counterpart of layer l of L is layer (l - 1) (L' - 1) / (L - 1) + 1, rounded (OPRD, arXiv
2606.06021); rounding a half up is our choice. First matches first, and last matches last.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from opdctl.errors import UsageError


@dataclass(frozen=True)
class Layers:
    """A selection of a student's layers.

    Attributes:
        selected: the layers' numbers, ascending.
        depth: the number of layers of the student.
    """

    selected: tuple[int, ...]
    depth: int

    @property
    def inner(self) -> tuple[int, ...]:
        """The selected layers before the last; the last one's states are stored in any case."""
        return tuple(layer for layer in self.selected if layer < self.depth)

    def state_indices(self, which: str) -> list[int]:
        """Return the indices of some layers in the stored states: the inner ones, then the last."""
        kept = (*self.inner, self.depth)
        return [kept.index(n) for n in layer_numbers(which, self.depth)]

    def counterparts(self, depth: int) -> tuple[int, ...]:
        """Return the layers of a model of ``depth`` layers that match the inner ones."""
        steps = max(1, self.depth - 1)
        return tuple(
            (2 * (layer - 1) * (depth - 1) + steps) // (2 * steps) + 1 for layer in self.inner
        )


AFTER = ("mamba", "mamba2", "falcon_mamba")  # their hidden_states begin with the first layer's
LAST = Layers((1,), 1)  # the last layer alone, whatever the depth of the model


def layer_numbers(which: str, depth: int) -> tuple[int, ...]:
    """Parse ``all``, ``last``, ``even``, ``odd`` or ``2,5`` into the numbers of layers."""
    every = range(1, depth + 1)
    named = {"all": every, "last": [depth], "even": every[1::2], "odd": every[::2]}
    return tuple(named[which] if which in named else sorted(set(map(int, which.split(",")))))


def layers_of(model: Any, which: Collection[str]) -> Layers:
    """Return the union of the layers that several texts such as ``even`` name.

    Raises:
        UsageError: one of the texts names no layer of the model.
    """
    depth = depth_of(model)
    for text in which:
        named = layer_numbers(text, depth)
        if not named or named[0] < 1 or named[-1] > depth:
            raise UsageError(
                f"layers {text}: {model.name} has the layers 1 to {depth}",
                "layers: all, last, even, odd, or a list of such numbers",
            )
    return Layers(tuple(sorted({n for text in which for n in layer_numbers(text, depth)})), depth)


def depth_of(model: Any) -> int:
    """Return the number of layers of a model."""
    return model.net.config.get_text_config().num_hidden_layers


class Returned(TypedDict, total=False):
    """The keyword arguments of a backbone that say what it returns."""

    output_hidden_states: bool


def forward_kwargs(layers: tuple[int, ...], model: Any) -> Returned:
    """Return the keyword arguments that make the backbone return the states of these layers."""
    depth = depth_of(model)
    return {"output_hidden_states": True} if any(n < depth for n in layers) else {}


def hidden_states(model: Any, out: Any, rows_N: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Gather the states of some layers from the backbone's output. Shape [N, len(layers), D].

    Args:
        out: the output of a transformers backbone.
        rows_N: rows of the flattened [B * T].

    Raises:
        UsageError: the architecture does not return one state a layer.
    """
    depth = depth_of(model)
    states = getattr(out, "hidden_states", None) or ()
    if any(n < depth for n in layers) and len(states) != depth + 1:
        kind = model.net.config.model_type
        raise UsageError(
            f"{model.name}: {kind} of {depth} layers returns {len(states)} hidden states",
            "layers: last",
        )
    before = int(model.net.config.model_type not in AFTER)  # the embedding's
    each = [states[n - 1 + before] if n < depth else out.last_hidden_state for n in layers]
    return torch.stack([state.flatten(0, 1)[rows_N] for state in each], 1)
