"""Weights on the straight line through two points: start + c (start - previous), and back.

Of whole weights (or the fp32 copies that an optimizer moves) each point is computed from the start
anew, in fp32 at least, so c = 0 is the start to the bit and a point that is taken twice has the
same bits. Of an adapter the line is that of the product B A: a line through A and through B alone
would bend in it. A point of the line has up to three times the adapter's rank and so is not an
adapter of that rank; it is exactly the trained adapter, left as it is, and a frozen one beside it,

    W + s B A + [c s B, -c s B'] [A; A']        B', A' the previous factors, s = alpha / rank,

whose rank grows by twice the adapter's each time that a point is kept. The factors, their moments
and their scale stay what they were; nothing is projected, so nothing is lost.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from opdctl.errors import UsageError
from opdctl.models.lora import BESIDE, NAME, library
from opdctl.models.model import Model


def chosen(names: list[str], patterns: list[str], where: str) -> list[str]:
    """The names that some pattern is found in.

    Raises:
        UsageError: a pattern is found in none; shows what there is.
    """
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})
            shown = ", ".join(kinds[:12])
            raise UsageError(f"{where}: {pattern!r} is found in no trained weight", f"of: {shown}")
    return [name for name in names if any(re.search(p, name) for p in patterns)]


def line_of(model: Model, patterns: list[str], where: str) -> Weights | Products:
    """What moves a student: its weights, or the product of its adapter.

    Args:
        patterns: regular expressions; each must be found in some trained weight's name.
        where: the key they stand under, for messages.
    """
    if model.adapter is not None:
        return Products(model, patterns, where)
    return Weights(model, chosen(list(model.trainable_parameters()), patterns, where))


class Weights:
    """Some of the weights of a model that is trained whole."""

    def __init__(self, model: Model, names: list[str]) -> None:
        self.model, self.names = model, names

    def point(self) -> dict[str, Tensor]:
        """Where the weights are now: copies in host memory."""
        moved = self.model.trainable_parameters()
        return {n: moved[n].detach().to("cpu", copy=True) for n in self.names}

    @torch.no_grad()
    def go(self, start: dict[str, Tensor], previous: dict[str, Tensor], c: float) -> None:
        """Set the weights to start + c (start - previous); c = 0 gives back the start's bytes."""
        moved = self.model.trainable_parameters()
        for name in self.names:
            weight = moved[name]
            at = start[name].to(weight.device)
            if c:
                wide = torch.promote_types(at.dtype, torch.float32)
                before = previous[name].to(weight.device, wide)
                at = at.to(wide) + c * (at.to(wide) - before)
            weight.copy_(at)
        if self.model.masters is not None:
            self.model.masters.publish()

    def keep(self) -> None:
        """The point that was gone to last is where the next line starts."""

    def state(self) -> dict[str, Tensor]:
        """The weights are in the checkpoint, and there is nothing else."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Nothing to give back."""


class Products:
    """Some of the layers of a model that is trained through an adapter."""

    def __init__(self, model: Model, patterns: list[str], where: str) -> None:
        """
        Raises:
            UsageError: a pattern is found nowhere, or experts have adapters: they are stacked, so
                ranks do not add up there as in a layer.
        """
        from peft.tuners.lora.layer import ParamWrapper

        self.model = model
        stacked = [n for n, m in model.net.named_modules() if isinstance(m, ParamWrapper)]
        if stacked:
            what = f"the adapter is on experts ({stacked[0]}), whose products cannot be moved"
            raise UsageError(f"{where}: {what}", "lora.targets=[q_proj, v_proj], or lora.rank=0")
        layers = {n: m for n, m in model.net.named_modules() if NAME in getattr(m, "lora_A", {})}
        # a layer's name has no dot at its end, and the patterns are those of its weight
        named = chosen([f"{n}.weight" for n in layers], patterns, where)
        self.layers: dict[str, Any] = {n: layers[n] for n in layers if f"{n}.weight" in named}
        self.kept: dict[str, Tensor] = {}  # the frozen adapter of the start
        self.now: dict[str, Tensor] = {}  # and of the point that was gone to

    def point(self) -> dict[str, Tensor]:
        """The trained factors now, s B in place of B: copies in host memory."""
        found = {}
        for name, layer in self.layers.items():
            a_RI, b_OR = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            found[f"{name}.A"] = a_RI.detach().to("cpu", copy=True)
            found[f"{name}.B"] = (layer.scaling[NAME] * b_OR.detach()).cpu()
        return found

    def go(self, start: dict[str, Tensor], previous: dict[str, Tensor], c: float) -> None:
        """Put c (start - previous), as products, beside the trained factors, which are the
        start's; c = 0 leaves what was kept."""
        found = dict(self.kept)
        for name in self.layers if c else ():
            a, b = f"{name}.A", f"{name}.B"
            rows = [*([found[a]] if a in found else []), start[a], previous[a]]
            columns = [*([found[b]] if b in found else []), c * start[b], -c * previous[b]]
            found[a], found[b] = torch.cat(rows, 0), torch.cat(columns, 1)
        self._put(found)

    def keep(self) -> None:
        """What lies beside the factors stays there."""
        self.kept = self.now

    def state(self) -> dict[str, Tensor]:
        """What lies beside the factors for good."""
        return self.kept

    def load(self, state: dict[str, Tensor]) -> None:
        """Put it there."""
        self.kept = state
        self._put(state)

    @torch.no_grad()
    def _put(self, factors: dict[str, Tensor]) -> None:
        """Replace the frozen adapter by one of these factors; without any there is none."""
        peft = self.model.adapter.peft
        if BESIDE in peft.peft_config:
            peft.delete_adapter(BESIDE)
        if factors:
            rank = len(next(iter(factors[f"{n}.A"] for n in self.layers)))
            config = library().LoraConfig(
                r=rank, lora_alpha=rank, target_modules=list(self.layers), task_type="CAUSAL_LM"
            )
            with torch.random.fork_rng(devices=[]):  # what it draws is overwritten
                peft.add_adapter(BESIDE, config)
            for name, layer in self.layers.items():
                layer.lora_A[BESIDE].weight.copy_(factors[f"{name}.A"])
                layer.lora_B[BESIDE].weight.copy_(factors[f"{name}.B"])
        peft.base_model.set_adapter([NAME, BESIDE] if factors else NAME)
        for layer in self.layers.values() if factors else ():
            for part in (layer.lora_A, layer.lora_B):
                part[BESIDE].weight.requires_grad_(False)
        self.now = factors
        self.model.count()
