"""LoRA adapters through peft: put on a student, read from a folder, merged, written.

Hu et al. 2021 (arXiv 2106.09685): W + (alpha / rank) B A, with W frozen. An adapter folder holds
adapter_config.json, which names the base, and adapter_model.safetensors; plain peft reads it. A
base that another stage wrote is named by its absolute path and, in a file beside the config, by its
relative path, so that a run that was moved or copied finds its own (plain peft reads the absolute
one). Adapters are fp32 on a bfloat16 base. Leaves out dropout, adapters of the head, and training
other kinds of adapters (any that peft reads can be a start or a teacher).

    opdctl stage opd --student FOLDER --teacher math=ADAPTER lora.rank=16 lora.output=adapter
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opdctl.config import references
from opdctl.config.settings import Lora
from opdctl.errors import UsageError
from opdctl.models import merging
from opdctl.models.model import Model
from opdctl.run.rundir import write_json

NAME = "default"  # what plain peft calls the only adapter of a model
FROZEN = "beside"  # the frozen adapter beside the trained one: models/extrapolation.py


@dataclass
class Adapter:
    """The adapter of a student.

    Attributes:
        peft: the PeftModel around the student's module.
        base: the reference of the base model.
        merged: True if the stage writes the merged model, False if it writes the adapter alone.
    """

    peft: Any
    base: str
    merged: bool

    def finish(self, model: Model, folder: Path) -> None:
        """Write the weights of a stage's output. Merging is in place, so call this last."""
        if self.merged:
            merging.merge(model, self.peft)
            model.net.save_pretrained(folder)
            return
        if len(self.peft.peft_config) > 1:
            join_frozen(self.peft)
        config = self.peft.peft_config[NAME]
        name, _, revision = self.base.partition("@")
        if Path(self.base).is_dir():
            name, revision = self.base, ""
        config.base_model_name_or_path, config.revision = name, revision or None
        config.target_modules = sorted(config.target_modules)  # a set, in no order that stays
        self.peft.save_pretrained(folder)
        run = folder.absolute().parents[1]  # of the stages
        if not revision and Path(name).is_relative_to(run):
            beside = {"path": os.path.relpath(name, folder.absolute())}
            write_json(folder / references.BESIDE, beside)
        (folder / "README.md").unlink(missing_ok=True)  # a form with nothing filled in


def import_peft() -> Any:
    """Import peft.

    Raises:
        UsageError: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise UsageError("adapters need peft", "pip install 'opdctl[peft]'") from error
    # peft uses a deprecated name of transformers; a user can do nothing about the warning
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    return peft


def attach(model: Model, lora: Lora, base: str, seed: int) -> None:
    """Put a new adapter on a model: B is zero, so it changes nothing yet; A is drawn from the seed.

    Nothing else of the model is trained, except the score of a classifier.

    Args:
        base: the reference of the base model.

    Raises:
        UsageError: a target is no module of the model, or one that cannot have an adapter.
    """
    peft, judges = import_peft(), hasattr(model.net, "score")
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets) or "all-linear",
        target_parameters=None if lora.targets else expert_tensors(model.net),
        exclude_modules=["score"] if judges else None,
        task_type=None if judges else "CAUSAL_LM",
    )
    head = model.head
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted = peft.get_peft_model(model.net, config)
        except ValueError as error:
            names = {n.rsplit(".", 1)[-1] for n, m in model.net.named_modules() if _linear(m)}
            raise UsageError(
                f"{model.name}: lora.targets={lora.targets}: {str(error).splitlines()[0]}",
                f"its linear layers: {', '.join(sorted(names))}",
            ) from error
    if model.head is not head:
        raise UsageError(
            f"{model.name}: lora.targets={lora.targets} has its head in it",
            "leave the head out: its logits are computed a chunk at a time, from one plain matrix",
        )
    _start(model, Adapter(adapted, base, lora.output == "merged"))


def _start(model: Model, adapter: Adapter) -> None:
    if hasattr(model.net, "score"):
        model.net.score.requires_grad_(True)  # a language model has none to start from
    model.adapter = adapter
    model.count()


def expert_tensors(net: torch.nn.Module) -> list[str] | None:
    """Return the names of a mixture's expert tensors [experts, ...], which are no linear layers."""
    names = {n for n, p in net.named_parameters() if p.ndim == 3 and ".experts." in n}
    return sorted({"experts." + n.rpartition(".")[2] for n in names}) or None


def unadapted_matrices(model: Model, lora: Lora) -> list[str]:
    """Return matrices that should have an adapter and have none, with layer numbers as ``*``.

    In some mixtures peft takes the names of layers for those of experts, and skips other modules of
    the same name: shared experts, layers without experts.
    """
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    adapted = set()
    for module in model.net.modules():
        if isinstance(module, ParamWrapper):
            adapted.add(id(module.get_param()))
        elif isinstance(module, LoraLayer):
            adapted.add(id(module.get_base_layer().weight))
    others = [m for m in model.net.modules() if isinstance(m, torch.nn.Embedding | torch.nn.Conv1d)]
    other = {id(p) for module in (*others, model.head) for p in module.parameters()}
    missed = set()
    for name, parameter in model.net.named_parameters():
        place = name.replace(".base_layer", "").removesuffix(".weight")
        targeted = not lora.targets or place.rpartition(".")[2] in lora.targets
        matrix = parameter.ndim >= 2 and ".lora_" not in name and not name.endswith("bias")
        if matrix and targeted and id(parameter) not in adapted | other:
            missed.add(re.sub(r"\.\d+\.", ".*.", place))
    return sorted(missed)


def _linear(module: Any) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D")


def continue_adapter(model: Model, folder: str, lora: Lora, base: str) -> None:
    """Put the adapter of a folder on a model, to train it further.

    Raises:
        UsageError: its rank, alpha or targets are not those of the keys.
    """
    adapted = read_adapter(model, folder, trainable=True)
    config = adapted.peft_config[NAME]
    theirs = {"rank": getattr(config, "r", 0), "alpha": getattr(config, "lora_alpha", 0)}
    if lora.targets and isinstance(config.target_modules, set):
        theirs["targets"] = sorted(config.target_modules)
    for key, value in theirs.items():
        wanted = getattr(lora, key)
        if value != (sorted(wanted) if key == "targets" else wanted):
            raise UsageError(
                f"{folder} is an adapter of {key} {value}, and lora.{key} is {wanted}",
                f"lora.{key}={value} trains it further; for a new one merge it first: opdctl stage "
                f"merge --student {base} models.a={folder}",
            )
    _start(model, Adapter(adapted, base, lora.output == "merged"))


def read_adapter(model: Model, folder: str, name: str = NAME, trainable: bool = False) -> Any:
    """Put the adapter of a folder on a model; return the PeftModel around its module.

    Raises:
        UsageError: peft cannot read it, it does not fit the model, or it is a learnt prompt and
            changes no weights.
    """
    peft = import_peft()
    require_safe(folder)
    try:
        if peft.PeftConfig.from_pretrained(folder).is_prompt_learning:
            raise ValueError("it is a learnt prompt, and those are not supported")
        return peft.PeftModel.from_pretrained(
            model.net, folder, adapter_name=name, is_trainable=trainable
        )
    except Exception as error:  # files of a stranger make peft raise anything
        raise adapter_error(folder, error) from error


def require_safe(folder: str) -> None:
    """Check that an adapter is saved as safetensors; without that file peft would read a pickle.

    Raises:
        UsageError: the file is missing.
    """
    if not Path(folder, "adapter_model.safetensors").is_file():
        problem = f"{folder} has no adapter_model.safetensors"
        hint = "save it again with safetensors: a pickle would run code, and is not read"
        raise UsageError(problem, hint)


def adapter_error(folder: str, error: Exception) -> UsageError:
    """Return the error for an adapter that does not fit its base."""
    cause = " ".join(str(error).split())
    hint = "its adapter_config.json names its base: is that the one it was trained on?"
    return UsageError(f"cannot load the adapter {folder}: {cause:.300}", hint)


def alters_base(config: dict) -> bool:
    """Return True if an adapter's start was subtracted from its base (PiSSA, OLoRA, CorDA, LoftQ).

    peft then changes the base's weights as it reads the adapter. Unknown starts count as such.
    """
    start = str(config.get("init_lora_weights", True)).lower()
    return start not in ("true", "false", "none", "gaussian", "orthogonal", "eva")


def merged(model: Model, folder: str) -> Model:
    """Return the model with the adapter of a folder merged into it.

    Raises:
        UsageError: it cannot be read or merged, or the model's 16-bit weights would round it away.
    """
    if merging.is_narrow(model.net):
        config = adapter_config(folder)
        rank, alpha = config.get("r", 0), config.get("lora_alpha", 0)
        raise UsageError(
            f"{folder} is an adapter, and its base in 16 bits would round away what it adds",
            f"lora.rank={rank} lora.alpha={alpha} trains it further; or runtime.dtype=float32",
        )
    peft = read_adapter(model, folder)
    model.name = folder
    merging.merge(model, peft)
    model.net.requires_grad_(True)  # peft froze the base
    return _with_tokenizer(model, folder)


def adapted(model: Model, folder: str) -> Model:
    """Return the model with the adapter of a folder on it, unmerged and frozen."""
    head, plain = model.head, hasattr(model.net, "score")
    read_adapter(model, folder)
    model.net.requires_grad_(False)
    model.own_head = None if plain else merging.head_now(model, head)
    return _with_tokenizer(model, folder)


def _with_tokenizer(model: Model, folder: str) -> Model:
    return Model(
        model.net,
        adapter_tokenizer(model, folder),
        folder,
        gradient_checkpointing=model.gradient_checkpointing,
        one_row=model.one_row,
        chat_keys=model.chat_keys,
        own_head=model.own_head,
    )


def adapter_config(folder: str) -> dict[str, Any]:
    """Return the content of an adapter's configuration.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise adapter_error(folder, error) from error


def adapter_tokenizer(model: Model, folder: str) -> Any:
    """Return the tokenizer of an adapter's folder, or that of its base if the folder has none."""
    from transformers import AutoTokenizer

    if not (Path(folder) / "tokenizer_config.json").is_file():
        return model.tokenizer
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # files of a stranger make transformers raise anything
        raise adapter_error(folder, error) from error


def adapter_parameters(model: Model, lora: Lora) -> int:
    """Return how many parameters ``attach`` would add to an outline, which does not change."""
    twin = copy.copy(model)
    twin.net = copy.deepcopy(model.net)  # without weights
    attach(twin, lora, "", 0)
    return twin.trained


class Incomparable(UsageError):
    """The error for an adapter whose change of the weights is unknown without the model."""


def weight_deltas(folder: str) -> dict[str, Any]:
    """Return the change an adapter makes to each weight: functions by the weight's name.

    Each returns (alpha / rank) B A, [out, in] in fp32.

    Raises:
        Incomparable: the folder holds more than factors A and B of one rank.
        UsageError: it cannot be read.
    """
    from safetensors.torch import load_file

    peft = import_peft()
    try:
        config = peft.PeftConfig.from_pretrained(folder)
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
        scale = config.lora_alpha / config.r
        others = config.use_dora or config.use_rslora or config.rank_pattern or config.alpha_pattern
        others = others or alters_base(config.to_dict())
    except Exception as error:  # files of a stranger make peft raise anything
        raise adapter_error(folder, error) from error
    if others or not all(n.endswith((".lora_A.weight", ".lora_B.weight")) for n in tensors):
        problem = f"{folder} is more than pairs of A and B of one rank"
        raise Incomparable(problem, "merge it into a model of its own first")

    def product(stem: str) -> torch.Tensor:
        b, a = (tensors[f"{stem}.lora_{x}.weight"].float() for x in "BA")
        return scale * (b @ a)

    stems = sorted({n.rpartition(".lora_")[0] for n in tensors})
    prefix = "base_model.model."
    return {f"{s.removeprefix(prefix)}.weight": functools.partial(product, s) for s in stems}


@torch.no_grad()
def join_frozen(peft: Any) -> None:
    """Join the trained adapter and the frozen one to one adapter, of the sum of their ranks."""
    layers = {n: m for n, m in peft.base_model.model.named_modules() if hasattr(m, "lora_A")}
    rank, config = 0, copy.copy(peft.peft_config[NAME])
    factors = {}
    for name, layer in layers.items():
        both = [x for x in (NAME, FROZEN) if x in layer.lora_A]
        a = torch.cat([layer.lora_A[x].weight for x in both], 0)
        b = torch.cat([layer.scaling[x] * layer.lora_B[x].weight for x in both], 1)
        factors[name], rank = (a, b), max(rank, len(a))
    config.r = config.lora_alpha = rank
    config.use_rslora, config.rank_pattern, config.alpha_pattern = False, {}, {}  # scale is in B
    for old in (FROZEN, NAME):
        peft.delete_adapter(old)
    with torch.random.fork_rng(devices=[]):
        peft.add_adapter(NAME, config)
    for name, (a, b) in factors.items():
        new_RI, new_OR = (layers[name].lora_A[NAME].weight, layers[name].lora_B[NAME].weight)
        new_RI.zero_()  # a layer that had nothing beside it has fewer
        new_OR.zero_()
        new_RI[: len(a)], new_OR[:, : len(a)] = a, b
