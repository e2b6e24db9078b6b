"""Checks that a model is loaded as it was written.

transformers fills missing weights at random, and rounds all of them to the type it is asked for.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from opdctl.config.references import parse
from opdctl.errors import UsageError

MERGED = "merged_adapter"  # in config.json: 16 bits would round away what an adapter added


def exact_type(config: Any, dtype: str, folder: str, widen: bool) -> str:
    """Return the type to load a checkpoint in, and take a merged adapter's mark off ``config``.

    Args:
        widen: load a marked one in float32 where ``dtype`` would round it.

    Raises:
        UsageError: it is marked, ``dtype`` would round it, and it may not be widened.
    """
    if not config.__dict__.pop(MERGED, False) or dtype != "bfloat16":
        return dtype
    if widen:
        return "float32"
    raise UsageError(
        f"{folder} is an adapter merged in float32, and bfloat16 would round away what it added",
        "lora.output=adapter in the stage that wrote it, or runtime.dtype=float32",
    )


def load_error(folder: str, error: Exception) -> UsageError:
    """Return the error for a model that transformers cannot load, with a hint by its cause."""
    if isinstance(error, UsageError):
        return error
    if isinstance(error, ImportError):  # the library of an attention
        return UsageError(
            f"cannot load {folder}: {error!s:.200}", "install it, or runtime.attn=auto"
        )
    if parse(folder).form == "public" and isinstance(error, OSError):
        problem = (
            f"cannot load {folder}: it is not in the cache of the hub, nor could it be fetched"
        )
        hint = f"where there is a network: hf download {folder.replace('@', ' --revision ')}"
        return UsageError(
            f"{problem}: {str(error).split(chr(10))[0]:.160}", f"{hint}; or its folder"
        )
    cause = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
    if "trust_remote_code" in str(error):
        hint = "it brings code of its own: read that, then runtime.trust_remote_code=true"
        return UsageError(f"cannot load {folder}: {cause}", hint)
    return UsageError(
        f"cannot load {folder}: {cause}",
        "a model is a folder in Hugging Face format: config.json, tokenizer, model.safetensors",
    )


def require_all_weights(model: Any, classifier: bool, report: dict[str, Any]) -> None:
    """Check that every weight came from the files, that all were used, and that all are finite.

    The score of a classifier that is made from a language model starts at zero.

    Args:
        report: transformers' loading info: ``missing_keys`` and ``unexpected_keys``.

    Raises:
        UsageError: a check fails; names the first weight.
    """
    net, kinds = model.net, model.net.config.architectures or []
    missing, left_over = set(report["missing_keys"]), set(report["unexpected_keys"])
    if classifier and not hasattr(net, "score"):
        problem = f"a token classifier of {net.config.model_type} has no linear head called score"
        raise UsageError(f"{model.name}: {problem}", "start from a model of another architecture")
    if classifier and not any("Classification" in a for a in kinds):
        missing -= {f"score.{n}" for n, _ in net.score.named_parameters()}
        left_over -= {n for n in left_over if n.startswith("lm_head.")}
        for parameter in net.score.parameters():
            nn.init.zeros_(parameter)
    left_over = {n for n in left_over if _belongs_to(net, n)}
    hint = "its config.json and its weights are of two models, or a file was cut short"
    for names, text in ((missing, "lacks {} weights"), (left_over, "has {} weights of no use")):
        if names:
            count = text.format(len(names))
            raise UsageError(f"{model.name} {count}, such as {min(names)}", hint)
    for name, parameter in model.net.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UsageError(
                f"{model.name}: {name} holds numbers that are not finite",
                "its training went wrong, or it was saved in too narrow a type",
            )


def _belongs_to(net: nn.Module, name: str) -> bool:
    """Return True if an unused tensor belongs to a module of the model, or to one more layer of it.

    False are parts beside a language model, such as a vision tower.
    """
    modules = {re.sub(r"\d+", "*", n) for n, _ in net.named_modules()}
    parts = re.sub(r"\d+", "*", name).split(".")
    owners = [".".join(parts[:n]) for n in range(1, len(parts))]
    return not owners or owners[-1] in modules or any("*" in o and o in modules for o in owners)
