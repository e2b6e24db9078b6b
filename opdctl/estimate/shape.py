"""Find the size of a model without loading it, from the recipe, a folder or the stage that makes
it.

The recipe gives the size of each public name (``shapes:``), so no network is needed; it may give
that of a folder. The size of an adapter is that of its file, added to that of the base it names. A
number that is not known is 0; the parts of an estimate that need it are left out and listed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opdctl.config import references
from opdctl.config.files import open_regular, read_text
from opdctl.config.shapes import Shape

CHARACTERS = 128  # vocabulary of a model that a recipe makes: at most so many


@dataclass(frozen=True)
class HeldModel:
    """A model as it is held in memory: its weights, and an adapter on them.

    Attributes:
        place: the place of the weights; models of one place share them.
        base: the size of the weights; None where it is not known.
        adapter: parameters of the adapter; 0 without one.
        name: the name of the adapter; empty without one.
    """

    place: str
    base: Shape | None
    adapter: float = 0.0
    name: str = ""

    @property
    def whole(self) -> Shape | None:
        """The size of both together: a token goes through all of the adapter."""
        return None if self.base is None else with_adapter(self.base, self.adapter)


def with_adapter(base: Shape, adapter: float) -> Shape:
    """Return the size of a model and an adapter of so many parameters together."""
    active = base.active and base.active + adapter
    return replace(base, parameters=base.parameters + adapter, active=active)


def shape_of(recipe: Any, reference: str, stage: str = "") -> Shape | None:
    """Return the size of a referenced model, its adapter included; None where it is not known.

    Args:
        stage: the stage that ``policy`` refers to.
    """
    return held_model(recipe, reference, stage).whole


def held_model(recipe: Any, reference: str, stage: str = "") -> HeldModel:
    """Return a referenced model as it is held; the arguments are those of ``shape_of``."""
    ref = references.parse(reference)
    if ref.form == "policy":
        return held_model(recipe, recipe.stages[stage].student)
    if ref.form == "stage":
        config = recipe.stages[ref.name]
        if not config.student:
            return HeldModel(reference, pretrain_shape(config.model))
        start, lora = held_model(recipe, config.student), config.lora
        if lora.rank and lora.output == "adapter":
            return replace(start, adapter=adapter_parameters(start, lora.rank), name=reference)
        return HeldModel(reference, start.base)
    listed = {references.parse(name).name: shape for name, shape in recipe.shapes.items()}
    if ref.form != "folder":
        return HeldModel(ref.name, listed.get(ref.name) or listed.get(ref.name.partition("@")[0]))
    if not (base := references.base_of(ref.name)):
        return HeldModel(ref.name, listed.get(ref.name) or folder_shape(Path(ref.name)))
    try:
        adapter = float(_parameters(Path(ref.name) / "adapter_model.safetensors"))
    except (OSError, ValueError, KeyError, TypeError):
        return HeldModel(ref.name, None)
    return replace(held_model(recipe, base), adapter=adapter, name=ref.name)


def adapter_parameters(start: HeldModel, rank: int) -> float:
    """Return the parameters of the adapter that a stage trains: the one it starts from, or a new
    one."""
    return start.adapter or (start.base.adapter(rank) if start.base else 0.0)


def pretrain_shape(model: Any) -> Shape:
    """Return the size of the Qwen3 that a pretrain stage makes, with CHARACTERS tokens."""
    width = model.head_dim
    attention = model.hidden * width * 2 * (model.heads + model.kv_heads) + 2 * width
    layer = attention + 3 * model.hidden * model.intermediate + 2 * model.hidden
    embedding = CHARACTERS * model.hidden * (1 if model.tied else 2)
    return Shape(
        parameters=float(embedding + model.layers * layer + model.hidden),
        layers=model.layers,
        hidden=model.hidden,
        intermediate=model.intermediate,
        kv_heads=model.kv_heads,
        head_dim=width,
        vocabulary=CHARACTERS,
    )


def cached_numbers(config: Mapping[str, Any]) -> int:
    """Return how many numbers a cache keeps of one token in one layer, from a config.json.

    They are keys and values of each head; with latent attention (MLA; DeepSeek-V3, arXiv
    2412.19437) the latent, the rotated part of the key, and the keys of an indexer of sparse
    attention (GLM-5).
    """
    if config.get("kv_lora_rank"):
        indexer = config.get("index_head_dim") or 0
        return config["kv_lora_rank"] + (config.get("qk_rope_head_dim") or 0) + indexer
    all_heads = config.get("num_attention_heads") or config.get("n_head") or 1
    hidden = config.get("hidden_size") or config.get("n_embd") or 0
    width = config.get("head_dim") or hidden // all_heads
    heads = config.get("num_key_value_heads") or all_heads
    return heads * (width + (config.get("v_head_dim") or width))


def folder_shape(folder: Path) -> Shape | None:
    """Return the size of a model in a folder, its parameters from the headers of the weight files;
    None where they cannot be read."""
    try:
        config = json.loads(read_text(folder / "config.json"))
        count = sum(_parameters(path) for path in folder.glob("model*.safetensors"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    config = config.get("text_config") or config
    heads = config.get("num_attention_heads") or 1
    hidden = config.get("hidden_size") or 0
    return (
        Shape(
            parameters=float(count),
            layers=config.get("num_hidden_layers") or 0,
            hidden=hidden,
            intermediate=config.get("intermediate_size") or 0,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            kept=cached_numbers(config),
            vocabulary=config.get("vocab_size") or 0,
        )
        if count
        else None
    )


def _parameters(path: Path) -> int:
    """Return the number of parameters in a safetensors file, from its header only."""
    with open_regular(path) as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
