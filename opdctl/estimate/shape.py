"""How large a model is, without loading it: from the recipe, a folder, or the stage that makes it.

Parameters stand in the recipe beside each public name (``shapes:``), so no network is needed; those
of a folder may. An adapter is as large as its file, on what it names as its base. A number that is
not known is 0, and what follows from it is left out and said to be.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opdctl.config import references
from opdctl.config.shapes import Shape

CHARACTERS = 128  # vocabulary of a model that a recipe makes: at most so many


@dataclass(frozen=True)
class Standing:
    """A model as it is held: its weights, and an adapter on them.

    Attributes:
        place: where the weights are; models that have it in common share them.
        base: their size; None where nothing says.
        adapter: parameters of the adapter; 0 is none.
        name: which adapter; empty is none.
    """

    place: str
    base: Shape | None
    adapter: float = 0.0
    name: str = ""

    @property
    def whole(self) -> Shape | None:
        """Both together: a token goes through all of the adapter."""
        if self.base is None:
            return None
        active = self.base.active and self.base.active + self.adapter
        return replace(self.base, parameters=self.base.parameters + self.adapter, active=active)


def shape_of(recipe: Any, reference: str, stage: str = "") -> Shape | None:
    """Size of a referenced model, its adapter included; None where nothing says.

    Args:
        stage: whose ``policy`` is meant.
    """
    return standing(recipe, reference, stage).whole


def standing(recipe: Any, reference: str, stage: str = "") -> Standing:
    """What a referenced model is held as; as for ``shape_of``."""
    ref = references.parse(reference)
    if ref.form == "policy":
        return standing(recipe, recipe.stages[stage].student)
    if ref.form == "stage":
        config = recipe.stages[ref.name]
        if not hasattr(config, "student"):
            return Standing(reference, made(config.model))
        start, lora = standing(recipe, config.student), getattr(config, "lora", None)
        if lora and lora.rank and lora.output == "adapter":
            return replace(start, adapter=added(start, lora.rank), name=reference)
        return Standing(reference, start.base)
    told = {references.parse(name).name: shape for name, shape in recipe.shapes.items()}
    if ref.form != "folder":
        return Standing(ref.name, told.get(ref.name) or told.get(ref.name.partition("@")[0]))
    if not (base := references.base_of(ref.name)):
        return Standing(ref.name, told.get(ref.name) or of_folder(Path(ref.name)))
    try:
        adapter = float(_parameters(Path(ref.name) / "adapter_model.safetensors"))
    except (OSError, ValueError, KeyError, TypeError):
        return Standing(ref.name, None)
    return replace(standing(recipe, base), adapter=adapter, name=ref.name)


def added(start: Standing, rank: int) -> float:
    """Parameters of the adapter that a stage trains: the one it starts from, or a new one."""
    return start.adapter or (start.base.adapter(rank) if start.base else 0.0)


def made(model: Any) -> Shape:
    """Size of the Qwen3 that a pretrain stage makes, of CHARACTERS tokens."""
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


def kept_of(config: Mapping[str, Any]) -> int:
    """Numbers that a cache keeps of one token in one layer, by the keys of a config.json.

    Keys and values of each head; with latent attention (MLA; DeepSeek-V3, arXiv 2412.19437) the
    latent and the rotated part of the key, and what an indexer of sparse attention (GLM-5) keys by.
    """
    if config.get("kv_lora_rank"):
        indexer = config.get("index_head_dim") or 0
        return config["kv_lora_rank"] + (config.get("qk_rope_head_dim") or 0) + indexer
    all_heads = config.get("num_attention_heads") or config.get("n_head") or 1
    hidden = config.get("hidden_size") or config.get("n_embd") or 0
    width = config.get("head_dim") or hidden // all_heads
    heads = config.get("num_key_value_heads") or all_heads
    return heads * (width + (config.get("v_head_dim") or width))


def of_folder(folder: Path) -> Shape | None:
    """Size of a model in a folder: parameters from the headers of its weight files."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
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
            kept=kept_of(config),
            vocabulary=config.get("vocab_size") or 0,
        )
        if count
        else None
    )


def _parameters(path: Path) -> int:
    """Numbers in a safetensors file, from its header alone."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
