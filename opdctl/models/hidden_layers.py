"""Hidden states of chosen layers, and which layer of a deeper or shallower model belongs to each.

Layers are numbered 1 to L; the embedding is none of them. The state of a layer before the last is
what the next layer reads, so no final norm has seen it; that of the last is the row after the final
norm, which the head reads. They are transformers' own ``hidden_states[1:]``. In a model of another
depth layer l of L stands beside layer (l - 1) (L' - 1) / (L - 1) + 1, rounded (OPRD, arXiv
2606.06021); a half rounds up, which is ours: first and last stand beside first and last.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opdctl.errors import UsageError


@dataclass(frozen=True)
class Layers:
    """Layers of a student.

    Attributes:
        chosen: their numbers, ascending.
        depth: how many it has.
    """

    chosen: tuple[int, ...]
    depth: int

    @property
    def inner(self) -> tuple[int, ...]:
        """Those before the last, whose states are kept apart: the last one's are always at hand."""
        return tuple(layer for layer in self.chosen if layer < self.depth)

    def places(self, which: str) -> list[int]:
        """Of some layers among the states that are kept: the inner ones, then the last."""
        kept = (*self.inner, self.depth)
        return [kept.index(n) for n in numbers(which, self.depth)]

    def beside(self, depth: int) -> tuple[int, ...]:
        """The layers of a model of ``depth`` layers that belong to the inner ones."""
        steps = max(1, self.depth - 1)
        return tuple(
            (2 * (layer - 1) * (depth - 1) + steps) // (2 * steps) + 1 for layer in self.inner
        )


AFTER = ("mamba", "mamba2", "falcon_mamba")  # their hidden_states begin with the first layer's
LAST = Layers((1,), 1)  # the last layer alone, which is numbered so in a model of any depth


def numbers(which: str, depth: int) -> tuple[int, ...]:
    """``all``, ``last``, ``even``, ``odd`` or ``2,5`` -> layers of a model of that depth."""
    every = range(1, depth + 1)
    named = {"all": every, "last": [depth], "even": every[1::2], "odd": every[::2]}
    return tuple(named[which] if which in named else sorted(set(map(int, which.split(",")))))


def layers_of(model: Any, which: Collection[str]) -> Layers:
    """The layers that several choices name together.

    Raises:
        UsageError: one of them names no layer of the model.
    """
    depth = depth_of(model)
    for text in which:
        found = numbers(text, depth)
        if not found or found[0] < 1 or found[-1] > depth:
            raise UsageError(
                f"layers {text}: {model.name} has the layers 1 to {depth}",
                "layers: all, last, even, odd, or a list of such numbers",
            )
    return Layers(tuple(sorted({n for text in which for n in numbers(text, depth)})), depth)


def depth_of(model: Any) -> int:
    """How many layers a model has."""
    return model.net.config.get_text_config().num_hidden_layers


def forward_kwargs(layers: tuple[int, ...], model: Any) -> dict[str, bool]:
    """What the backbone is told so that it returns the states of these layers."""
    depth = depth_of(model)
    return {"output_hidden_states": True} if any(n < depth for n in layers) else {}


def hidden_states(model: Any, out: Any, rows_N: Tensor, layers: tuple[int, ...]) -> Tensor:
    """States of some layers in what the backbone returned. Shape [N, len(layers), D].

    Args:
        rows_N: rows of the flattened [B * T].

    Raises:
        UsageError: the architecture does not return one state a layer.
    """
    depth = depth_of(model)
    found = getattr(out, "hidden_states", None) or ()
    if any(n < depth for n in layers) and len(found) != depth + 1:
        kind = model.net.config.model_type
        raise UsageError(
            f"{model.name}: {kind} of {depth} layers returns {len(found)} hidden states",
            "layers: last",
        )
    before = int(model.net.config.model_type not in AFTER)  # the embedding's
    each = [found[n - 1 + before] if n < depth else out.last_hidden_state for n in layers]
    return torch.stack([state.flatten(0, 1)[rows_N] for state in each], 1)
