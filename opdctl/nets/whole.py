"""Is all of a model there? transformers starts from random numbers what the files lack."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from opdctl.errors import UsageError


def require_whole(model: Any, missing: set[str], left_over: set[str]) -> None:
    """Every weight comes from the files, no tensor of theirs is left over, all are finite.

    Args:
        missing: names that the files lack.
        left_over: names in the files that nothing took.

    Raises:
        UsageError: not so; names the first.
    """
    left_over = {n for n in left_over if _inside(model.net, n)}
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
