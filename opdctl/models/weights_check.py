"""Is all of a model there? transformers starts from random numbers what the files lack."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from opdctl.config.references import parse
from opdctl.errors import UsageError


def unreadable(folder: str, error: Exception) -> UsageError:
    """What to say of files that transformers makes nothing of."""
    if isinstance(error, UsageError):
        return error
    if isinstance(error, ImportError):  # the library of an attention
        return UsageError(
            f"cannot load {folder}: {error!s:.200}", "install it, or runtime.attn=auto"
        )
    if parse(folder).form == "public" and isinstance(error, OSError):
        what = f"cannot load {folder}: it is not in the cache of the hub, nor could it be fetched"
        hint = f"where there is a network: hf download {folder.replace('@', ' --revision ')}"
        return UsageError(f"{what}: {str(error).split(chr(10))[0]:.160}", f"{hint}; or its folder")
    what = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
    if "trust_remote_code" in str(error):
        hint = "it brings code of its own: read that, then runtime.trust_remote_code=true"
        return UsageError(f"cannot load {folder}: {what}", hint)
    return UsageError(
        f"cannot load {folder}: {what}",
        "a model is a folder in Hugging Face format: config.json, tokenizer, model.safetensors",
    )


def require_whole(model: Any, classifier: bool, found: dict[str, Any]) -> None:
    """Every weight comes from the files, no tensor of theirs is left over, all are finite. The
    score of a classifier that is made from a language model starts at zero.

    Args:
        found: what transformers said of loading it.

    Raises:
        UsageError: not so; names the first.
    """
    net, kinds = model.net, model.net.config.architectures or []
    missing, left_over = set(found["missing_keys"]), set(found["unexpected_keys"])
    if classifier and not hasattr(net, "score"):
        what = f"a token classifier of {net.config.model_type} has no linear head called score"
        raise UsageError(f"{model.name}: {what}", "start from a model of another architecture")
    if classifier and not any("Classification" in a for a in kinds):
        missing -= {f"score.{n}" for n, _ in net.score.named_parameters()}
        left_over -= {n for n in left_over if n.startswith("lm_head.")}
        for parameter in net.score.parameters():
            nn.init.zeros_(parameter)
    left_over = {n for n in left_over if _inside(net, n)}
    hint = "its config.json and its weights are of two models, or a file was cut short"
    for names, what in ((missing, "lacks {} weights"), (left_over, "has {} weights of no use")):
        if names:
            count = what.format(len(names))
            raise UsageError(f"{model.name} {count}, such as {min(names)}", hint)
    for name, parameter in model.net.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UsageError(
                f"{model.name}: {name} holds numbers that are not finite",
                "its training went wrong, or it was saved in too narrow a type",
            )


def _inside(net: nn.Module, name: str) -> bool:
    """Whether a tensor that nothing took belongs to a module of the model, or to one more of its
    layers; not so are parts beside a language model, such as a vision tower."""
    modules = {re.sub(r"\d+", "*", n) for n, _ in net.named_modules()}
    parts = re.sub(r"\d+", "*", name).split(".")
    owners = [".".join(parts[:n]) for n in range(1, len(parts))]
    return not owners or owners[-1] in modules or any("*" in o and o in modules for o in owners)
