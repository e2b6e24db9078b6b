"""Weights on the straight line through two points: start + c (start - previous), and back.

For a model trained in full (its weights, or their fp32 copies), each point is computed anew from
the start, in fp32 at least: c = 0 gives the start to the bit, and the same point twice gives the
same bits. For an adapter the line runs through the product B A; a line through A and through B
separately would bend there. A point on it has up to three times the adapter's rank, so it is no
adapter of that rank; it is the trained adapter, left as it is, with a frozen one beside it,

    W + s B A + [c s B, -c s B'] [A; A']        B', A' the previous factors, s = alpha / rank,

whose rank grows by twice the adapter's each time a point is kept. The factors, their moments and
their scale do not change; nothing is projected, so nothing is lost.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from opdctl.errors import UsageError
from opdctl.models.lora import FROZEN, NAME, import_peft
from opdctl.models.model import Model


def matching_names(names: list[str], patterns: list[str], where: str) -> list[str]:
    """Return the names that match at least one pattern.

    Raises:
        UsageError: a pattern matches no name; shows the names there are.
    """
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})
            shown = ", ".join(kinds[:12])
            raise UsageError(f"{where}: {pattern!r} is found in no trained weight", f"of: {shown}")
    return [name for name in names if any(re.search(p, name) for p in patterns)]


def line_of(model: Model, patterns: list[str], where: str) -> WeightLine | AdapterLine:
    """Return the line of a student: of its weights, or of the products of its adapter.

    Args:
        patterns: regular expressions; each must match the name of a trained weight.
        where: the recipe key of the patterns, for messages.
    """
    if model.adapter is not None:
        return AdapterLine(model, patterns, where)
    return WeightLine(model, matching_names(list(model.trainable_parameters()), patterns, where))


class WeightLine:
    """The line through some of the weights of a model that is trained in full."""

    def __init__(self, model: Model, names: list[str]) -> None:
        self.model, self.names = model, names

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies of the weights as they are now, in host memory."""
        trained = self.model.trainable_parameters()
        return {n: trained[n].detach().to("cpu", copy=True) for n in self.names}

    @torch.no_grad()
    def move_to(self, start: dict[str, Tensor], previous: dict[str, Tensor], c: float) -> None:
        """Set the weights to start + c (start - previous); c = 0 gives back the start's bytes."""
        trained = self.model.trainable_parameters()
        for name in self.names:
            weight = trained[name]
            at = start[name].to(weight.device)
            if c:
                wide = torch.promote_types(at.dtype, torch.float32)
                before = previous[name].to(weight.device, wide)
                at = at.to(wide) + c * (at.to(wide) - before)
            weight.copy_(at)
        if self.model.masters is not None:
            self.model.masters.publish()

    def keep(self) -> None:
        """Make the last point the start of the next line; the weights are there already."""

    def state(self) -> dict[str, Tensor]:
        """Return no tensors: the weights are in the checkpoint anyway."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Do nothing: there is no state beside the weights."""


class AdapterLine:
    """The line through the products B A of some layers of a student with an adapter."""

    def __init__(self, model: Model, patterns: list[str], where: str) -> None:
        """Select the layers whose weights match the patterns.

        Raises:
            UsageError: a pattern matches nothing, or experts have adapters: those are stacked, and
                ranks do not add up in them as in a layer.
        """
        from peft.tuners.lora.layer import ParamWrapper

        self.model = model
        stacked = [n for n, m in model.net.named_modules() if isinstance(m, ParamWrapper)]
        if stacked:
            problem = f"the adapter is on experts ({stacked[0]}), whose products cannot be moved"
            raise UsageError(f"{where}: {problem}", "lora.targets=[q_proj, v_proj], or lora.rank=0")
        layers = {n: m for n, m in model.net.named_modules() if NAME in getattr(m, "lora_A", {})}
        # a layer's name has no dot at its end, and the patterns are those of its weight
        named = matching_names([f"{n}.weight" for n in layers], patterns, where)
        self.layers: dict[str, Any] = {n: layers[n] for n in layers if f"{n}.weight" in named}
        self.kept: dict[str, Tensor] = {}  # the frozen factors at the start
        self.now: dict[str, Tensor] = {}  # and at the last point

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies of the trained factors in host memory, s B in place of B."""
        factors = {}
        for name, layer in self.layers.items():
            a_RI, b_OR = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            factors[f"{name}.A"] = a_RI.detach().to("cpu", copy=True)
            factors[f"{name}.B"] = (layer.scaling[NAME] * b_OR.detach()).cpu()
        return factors

    def move_to(self, start: dict[str, Tensor], previous: dict[str, Tensor], c: float) -> None:
        """Put c (start - previous), as products, beside the trained factors, which do not move.

        c = 0 leaves only the kept frozen factors there.
        """
        factors = dict(self.kept)
        for name in self.layers if c else ():
            a, b = f"{name}.A", f"{name}.B"
            rows = [*([factors[a]] if a in factors else []), start[a], previous[a]]
            columns = [*([factors[b]] if b in factors else []), c * start[b], -c * previous[b]]
            factors[a], factors[b] = torch.cat(rows, 0), torch.cat(columns, 1)
        self._put(factors)

    def keep(self) -> None:
        """Keep the frozen factors of the last point for good."""
        self.kept = self.now

    def state(self) -> dict[str, Tensor]:
        """Return the frozen factors that were kept."""
        return self.kept

    def load(self, state: dict[str, Tensor]) -> None:
        """Set the frozen factors from a checkpoint."""
        self.kept = state
        self._put(state)

    @torch.no_grad()
    def _put(self, factors: dict[str, Tensor]) -> None:
        """Replace the frozen adapter by one with these factors; remove it if there are none."""
        peft = self.model.adapter.peft
        if FROZEN in peft.peft_config:
            peft.delete_adapter(FROZEN)
        if factors:
            rank = len(next(iter(factors[f"{n}.A"] for n in self.layers)))
            config = import_peft().LoraConfig(
                r=rank, lora_alpha=rank, target_modules=list(self.layers), task_type="CAUSAL_LM"
            )
            with torch.random.fork_rng(devices=[]):  # what it draws is overwritten
                peft.add_adapter(FROZEN, config)
            for name, layer in self.layers.items():
                layer.lora_A[FROZEN].weight.copy_(factors[f"{name}.A"])
                layer.lora_B[FROZEN].weight.copy_(factors[f"{name}.B"])
        peft.base_model.set_adapter([NAME, FROZEN] if factors else NAME)
        for layer in self.layers.values() if factors else ():
            for part in (layer.lora_A, layer.lora_B):
                part[FROZEN].weight.requires_grad_(False)
        self.now = factors
        self.model.count()
