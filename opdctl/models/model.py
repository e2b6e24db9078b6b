"""A transformers model as backbone and head, with the few guarantees the mathematics needs.

Logits are fp32 (fp64 for an fp64 model), softcapped as the model says, and -inf on the ids
beyond the tokenizer's own: padded rows of the embedding change nothing, anywhere.
Loading reads no pickle, runs code from a checkpoint only where a key allows it, and takes no model
whose weights are not all there and finite.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opdctl.config.references import first_difference
from opdctl.errors import UsageError
from opdctl.kernels.head import Head
from opdctl.models.chat.control_tokens import NO_KEYS, ChatKeys
from opdctl.models.chat.ends import different_ends
from opdctl.models.chat.rendering import Chat
from opdctl.models.gradient_checkpointing import checkpointing, enable_checkpointing
from opdctl.models.logits_check import (
    isolates_packed_sequences,
    require_own_logits,
    softcap_and_scale,
)
from opdctl.models.weights_check import exact_type, load_error, require_all_weights


@dataclass
class Model(Chat):
    """A causal language model, or a token classifier, and its tokenizer.

    Attributes:
        net: the transformers module.
        tokenizer: its tokenizer.
        name: the folder, public name or stage it came from, for messages.
        adapter: the adapter that a stage trains in place of the weights, see models/lora.py.
        masters: fp32 copies of the parameters, see models/master_weights.py.
        gradient_checkpointing: a pass that needs a gradient computes activations again, see
            models/gradient_checkpointing.py.
        one_row: sequences stand one after another in a pass, without padding.
        chat_keys: the keys of the run that say how it is spoken to.
        before_forward: called before each forward; a teacher that is an adapter turns it on.
        own_head: the head, where the module's own has an adapter in it that is not trained.
    """

    net: Any
    tokenizer: Any
    name: str = ""
    adapter: Any = None
    masters: Any = None
    gradient_checkpointing: bool = False
    one_row: bool = False
    chat_keys: ChatKeys = NO_KEYS
    before_forward: Callable[[], None] = lambda: None
    own_head: nn.Linear | None = None

    def __post_init__(self) -> None:
        self.rows: int = len(self.net.get_input_embeddings().weight)  # a layer of peft has one too
        self.begin_chat(getattr(self.net, "generation_config", None) or self.net.config)
        self.sampling_checked = False  # not yet compared with itself step by step
        ids = 1 + max(self.tokenizer.get_vocab().values())  # len() would miss ids after a hole
        self.valid_V = min(ids, self.net.config.get_text_config().vocab_size)
        self.softcap, self.scale = softcap_and_scale(self.net.config.get_text_config())
        self.count()

    def count(self) -> None:
        """Set ``parameters``, ``trained`` (how many of them), and ``flops`` per token of an update.

        Two a parameter forward, two back through it, and two for its own gradient.
        """
        self.parameters = sum(p.numel() for p in self.net.parameters())
        self.trained = sum(p.numel() for p in self.net.parameters() if p.requires_grad)
        self.flops = 4.0 * self.parameters + 2.0 * self.trained

    def trainable_parameters(self) -> dict[str, Tensor]:
        """Return the tensors an optimizer moves, by name: fp32 masters or trained parameters."""
        if self.masters is not None:
            return self.masters.named
        return {n: p for n, p in self.net.named_parameters() if p.requires_grad}

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def logits_dtype(self) -> torch.dtype:
        """The type of logits, log-probs and everything per token."""
        return torch.promote_types(next(self.net.parameters()).dtype, torch.float32)

    @property
    def head(self) -> nn.Linear:
        """The language-model head, or the score head of a classifier."""
        if self.own_head is not None:
            return self.own_head
        return self.net.score if hasattr(self.net, "score") else self.net.get_output_embeddings()

    def backbone(self, input_ids: Tensor, **options: Any) -> Any:
        """Run the transformer without its head; causal, right-padded. Hidden is [B, T, D]."""
        self.before_forward()
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        with checkpointing(self.net) if again else contextlib.nullcontext():
            return self.net.base_model(input_ids=input_ids, **options)

    def own_logits(self, ids_BT: Tensor) -> Tensor:
        """Return the logits that the model itself computes, [B, T, V], to compare with."""
        self.before_forward()
        return self.net(ids_BT).logits

    def lm_head(self, temperature: float = 1.0, rounded: bool = False) -> Head:
        """Return the head as a linear map, with the guarantees the mathematics needs.

        Raises:
            UsageError: the head is no plain linear layer (LoRA, quantised); names its type.
        """
        layer = self.head
        if type(layer) is not nn.Linear:
            raise UsageError(
                f"{self.name}: its head is a {type(layer).__name__}, not one plain linear layer",
                "leave the head out of the adapter's target_modules, or train it in full",
            )
        valid_V = min(self.valid_V, len(layer.weight))
        softcap = None if hasattr(self.net, "score") else self.softcap
        scale = 1.0 if hasattr(self.net, "score") else self.scale
        return Head(layer.weight, valid_V, layer.bias, softcap, temperature, rounded, scale)

    def logits(self, hidden_ND: Tensor, temperature: float = 1.0) -> Tensor:
        """Return next-token logits [N, V] at a temperature, fp32 or wider, invalid ids at -inf."""
        logits_NV = self.lm_head(temperature).logits(hidden_ND)
        missing = self.head.out_features - logits_NV.shape[-1]
        return (
            nn.functional.pad(logits_NV, (0, missing), value=-torch.inf) if missing else logits_NV
        )


def pick_device(wanted: str) -> str:
    """Return ``cuda`` or ``cpu``; ``auto`` is CUDA if there is one.

    Raises:
        UsageError: CUDA is wanted and there is none.
    """
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise UsageError("runtime.device is cuda and there is none", "runtime.device=cpu")
    return "cuda" if there and wanted != "cpu" else "cpu"


def outline(folder: str, trust_remote_code: bool = False, chat_keys: ChatKeys = NO_KEYS) -> Model:
    """Load a language model without its weights, on the meta device: tokenizer, shapes, rendering.

    Raises:
        UsageError: the tokenizer or the configuration cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    name, options = location(folder, trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        config = AutoConfig.from_pretrained(name, **options)
        with torch.device("meta"):
            net = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        with contextlib.suppress(OSError):  # a folder may lack it: the configuration stands in
            net.generation_config = GenerationConfig.from_pretrained(name, **options)
        return Model(net.train(False), tokenizer, folder, chat_keys=chat_keys)
    except Exception as error:  # files of a stranger make transformers raise anything
        raise load_error(folder, error) from error


def template_of(folder: str, trust_remote_code: bool = False) -> str | None:
    """Return the chat template of a model's tokenizer; None if it has none.

    Raises:
        UsageError: the tokenizer cannot be read.
    """
    from transformers import AutoTokenizer

    name, options = location(folder, trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(name, **options).chat_template
    except Exception as error:  # files of a stranger make transformers raise anything
        raise load_error(folder, error) from error


def location(folder: str, trust_remote_code: bool) -> tuple[str, dict]:
    """Return the folder or public name to load, and the keyword arguments of from_pretrained."""
    name, _, revision = folder.partition("@") if not Path(folder).is_dir() else (folder, "", "")
    options = {"trust_remote_code": trust_remote_code}
    return name, options | ({"revision": revision} if revision else {})


def load(
    folder: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    classifier: bool = False,
    trust_remote_code: bool = False,
    attn: str = "auto",
    gradient_checkpointing: bool = False,
    packing: str = "auto",
    chat_keys: ChatKeys = NO_KEYS,
    widen: bool = False,
) -> Model:
    """Load a model from a folder or a public name (``name@revision``).

    Args:
        classifier: load it with one score per token in place of the language-model head; the
            score starts at zero unless the folder has one.
        trust_remote_code: run code that the model brings.
        attn: implementation of attention, by transformers' name; auto leaves it to transformers.
        gradient_checkpointing: gradient checkpointing.
        packing: ``packed`` without padding, ``padded``, or ``auto``: packed with flash attention.
        chat_keys: the keys of the run that say how the model is spoken to.
        widen: load in float32 what a narrower type would round away (``models/merging.py``).

    Raises:
        UsageError: the model cannot be loaded or is incomplete; says from where and why.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForTokenClassification,
        AutoTokenizer,
    )

    name, options = location(folder, trust_remote_code)
    kind: Any = AutoModelForTokenClassification if classifier else AutoModelForCausalLM
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        config = AutoConfig.from_pretrained(name, **options)
        dtype = exact_type(config, dtype, folder, widen)
        if classifier:
            config.num_labels = 1
        if attn != "auto":
            options["attn_implementation"] = attn
        net, report = kind.from_pretrained(
            name,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        model = Model(net.to(device).train(False), tokenizer, folder, chat_keys=chat_keys)
    except Exception as error:  # files of a stranger make transformers raise anything
        raise load_error(folder, error) from error
    require_all_weights(model, classifier, report)
    require_own_logits(model)
    configure_forward(model, packing, gradient_checkpointing)
    return model


def configure_forward(model: Model, packing: str, gradient_checkpointing: bool) -> None:
    """Set how sequences are packed and whether gradients are checkpointed; see ``load``.

    Raises:
        UsageError: the model does not support it.
    """
    implementation = str(model.net.config.get_text_config()._attn_implementation)
    if packing == "packed" or (packing == "auto" and implementation.startswith("flash")):
        model.one_row = isolates_packed_sequences(model, required=packing == "packed")
    if gradient_checkpointing:
        enable_checkpointing(model.net, model.name)
        model.gradient_checkpointing = True


def different_tokens(student: Model, teacher: Model) -> tuple[str, str] | None:
    """Return ``(problem, hint)`` if an id or an end token differs between the two; else None."""
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    difference = first_difference(ours, theirs)
    if difference:
        return (
            f"{teacher.name} and the student {student.name} have different tokenizers: "
            f"{difference}",
            "use a teacher of the same tokenizer, or its texts: an sft stage with sources.teacher",
        )
    return different_ends(student, teacher)


def require_same_tokens(student: Model, teacher: Model, where: str) -> None:
    """Check that token ids mean the same to student and teacher.

    Args:
        where: the recipe key that names the teacher, for messages.

    Raises:
        UsageError: they do not; names the first id that differs.
    """
    difference = different_tokens(student, teacher)
    if difference:
        raise UsageError(f"{where}: {difference[0]}", difference[1])
    if student.valid_V != teacher.valid_V:
        fewer = min(student, teacher, key=lambda model: model.valid_V)
        raise UsageError(
            f"{where}: the head of {fewer.name} has {fewer.valid_V} rows, fewer than its tokenizer "
            "has ids",
            "resize its embedding to its tokenizer",
        )


def save(model: Model, folder: Path) -> None:
    """Write a checkpoint in Hugging Face format, each file synced to disk."""
    model.write_ends(getattr(model.net, "generation_config", None))
    if model.adapter is not None:
        model.adapter.finish(model, folder)
    else:
        model.net.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
