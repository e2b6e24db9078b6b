"""Adapters merged into their base: W + (alpha / rank) B A, never in fewer than 32 bits.

bfloat16 keeps 8 bits of a weight, and most of what an adapter adds to it is below the last of them:
written in that type the policy that was trained is gone. So weights are widened before something is
added to them. peft's own layers do the adding, whatever their kind; here they are given a weight of
their own first where the base ties the embedding to the head, since peft writes into the shared
matrix and so into a layer that has no adapter.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from opdctl.errors import UsageError
from opdctl.models.model import Model
from opdctl.models.weights_check import MERGED


def is_narrow(net: nn.Module) -> bool:
    """Return True for a model whose weights have fewer than 32 bits."""
    return next(net.parameters()).dtype.itemsize < 4


def has_adapter(net: nn.Module) -> bool:
    """Return True if a model has layers of peft in it."""
    return next(_adapted(net), None) is not None


def widen(net: Any) -> None:
    """Make a 16-bit model one of float32, and note in its configuration that it has to stay so."""
    net.float()
    setattr(net.config, MERGED, True)


def merge(model: Model, peft: Any) -> None:
    """Replace every layer with an adapter by a plain one; 16-bit weights become float32 first.

    Args:
        peft: the PeftModel around the model's module, with the adapters to merge active.

    Raises:
        UsageError: peft cannot merge this kind of adapter.
    """
    net = model.net
    if is_narrow(net):
        widen(net)
    untie(net)
    with merge_by_peft(model.name), warnings.catch_warnings():
        # of what ``record_ties`` sets right
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
        peft.merge_and_unload()
    record_ties(net)


@contextlib.contextmanager
def merge_by_peft(name: str) -> Iterator[None]:
    """Turn what peft raises for layers that it cannot merge into a refusal.

    Args:
        name: the name of the model.

    Raises:
        UsageError: peft cannot merge this kind of adapter.
    """
    try:
        yield
    except (RuntimeError, ValueError, NotImplementedError) as error:
        cause = " ".join(str(error).split())
        hint = "keep it apart from its base: lora.output=adapter, or as a teacher"
        raise UsageError(f"{name}: its adapter cannot be merged: {cause:.200}", hint) from error


def untie(net: nn.Module) -> None:
    """Give each layer with an adapter a weight of its own where it shares one with another layer.

    peft adds to a weight in place: one that an embedding shares with the head would change both.
    """
    owners: dict[int, int] = {}
    for module in net.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for _, layer in _adapted(net):
        for module in layer.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if owners.get(id(parameter), 0) > 1:
                    own = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                    setattr(module, name, own)
                    owners[id(parameter)] -= 1


def record_ties(net: Any) -> None:
    """Set ``tie_word_embeddings`` to whether the head is the embedding's matrix now.

    A head that is another matrix and is said to be tied would be left out of the file.
    """
    head, embedding = net.get_output_embeddings(), net.get_input_embeddings()
    if not isinstance(head, nn.Linear):
        return
    head.out_features, head.in_features = head.weight.shape  # a tied one of peft has them swapped
    if head.weight is not embedding.weight:
        for config in (net.config, net.config.get_text_config()):
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False


def _adapted(net: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) of every layer of peft that stands in no other one."""
    if "peft" not in sys.modules:  # which is no part of every installation
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inside = "\n"
    for name, module in net.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inside = f"{name}."
            yield name, module


@torch.no_grad()
def plain_layer(layer: Any) -> nn.Module:
    """Return a layer as it computes now, adapters merged, as a plain module with its own weights.

    The layer does not change. 16-bit weights are widened where something is added to them.

    Args:
        layer: a layer of peft.

    Raises:
        ValueError, RuntimeError: peft cannot merge it.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper

    twin: Any = copy.deepcopy(layer)
    if next(twin.parameters()).dtype.itemsize < 4:
        twin.float()
    on, names = not twin.disable_adapters, None
    if isinstance(twin, AuxiliaryTrainingWrapper):  # a module that is kept whole, or some tokens
        names = twin.active_adapters[:1]
        if not on or not twin._adapters.issuperset(names):
            return twin.original_module
    whole: Any = twin
    if hasattr(whole, "unload_and_optionally_merge_module"):
        return whole.unload_and_optionally_merge_module(
            merge=on, safe_merge=False, adapter_names=names
        )
    if on:
        whole.merge()
    return whole.get_base_layer()


def unload(net: Any) -> None:
    """Replace every layer with an adapter by a plain one that computes as it does now."""
    for name, layer in list(_adapted(net)):
        net.set_submodule(name, plain_layer(layer))
    record_ties(net)


def untie_head(net: Any, weights: dict[str, Tensor]) -> None:
    """Give a tied head a matrix of its own where ``weights`` are others for it than for the
    embedding."""
    if any(not torch.equal(weights[a], weights[b]) for a, b in _tied(net, weights)):
        head = net.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
        record_ties(net)


def _tied(net: Any, weights: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of names in ``weights`` that a model was made to tie."""
    for target, source in getattr(net, "all_tied_weights_keys", {}).items():
        one, other = weights.get(target), weights.get(source)
        if one is not None and other is not None and one.data_ptr() != other.data_ptr():
            yield target, source


def head_now(model: Model, plain: nn.Linear) -> nn.Linear:
    """Return the head that a model computes with now: a plain layer, frozen.

    Args:
        plain: its head as it was without adapters.

    Raises:
        UsageError: peft cannot merge the adapter of the head.
    """
    layer = model.net.get_output_embeddings()
    if layer is plain or layer is None:
        return plain
    with merge_by_peft(model.name):
        head: Any = plain_layer(layer)
    head.out_features, head.in_features = head.weight.shape
    return head.requires_grad_(False)


def with_adapters(model: Model) -> dict[str, Tensor]:
    """Return the weights of the same model without adapters, by its names.

    Every active adapter is in them. Weights that it adds to are float32 at least; the others have
    their own type. The model does not change.

    Raises:
        UsageError: peft cannot merge this kind of adapter.
    """
    model.before_forward()
    layers = dict(_adapted(model.net))
    weights = dict(model.net.state_dict())
    for name, layer in layers.items():
        weights = {n: w for n, w in weights.items() if not n.startswith(f"{name}.")}
        with merge_by_peft(model.name):
            plain = plain_layer(layer)
        weights |= {f"{name}.{n}": w for n, w in plain.state_dict().items()}
    return weights


def dense_weights(model: Model) -> dict[str, Tensor]:
    """Return the weights of a model by name, with its adapters in them if it has any."""
    return with_adapters(model) if has_adapter(model.net) else model.net.state_dict()


def require_tied(model: Model, weights: dict[str, Tensor]) -> None:
    """Check that weights which a model ties are equal: a sampler that ties them takes one of them.

    Raises:
        UsageError: an adapter parts them; names the weight.
    """
    for target, source in _tied(model.net, weights):
        if not torch.equal(weights[target], weights[source]):
            raise UsageError(
                f"{model.name}: its adapter parts {target} from {source}, which the sampler ties",
                "runtime.engine=transformers",
            )
