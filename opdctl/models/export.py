"""The output of a stage: written, read back, and held against the policy that was trained.

A few tokens go through the model before it is written and through what transformers and peft make
of the files afterwards. Both have the same type and stand on the same device, so their log-probs
are equal but for the rounding of a merge in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opdctl.errors import StageFailed
from opdctl.models import model as models
from opdctl.models.merging import is_narrow, widen
from opdctl.models.model import Model

TOLERANCE = 1e-3  # nats; of a classifier, of its score
ROWS, LENGTH = 2, 16  # sequences and tokens of the probe


def export(model: Model, folder: Path) -> float:
    """Write a checkpoint and return by how much its log-probs differ from the model's, in nats.

    The model is not to be used afterwards: its adapter may be merged, and it may stand in host
    memory.

    Raises:
        StageFailed: they differ by more than ``TOLERANCE``; says by how much.
    """
    if model.adapter is not None and model.adapter.merged and is_narrow(model.net):
        _widen(model)
    ids_BT = probe_ids(model)
    before = probe(model, ids_BT)
    device = model.device
    models.save(model, folder)
    written = read_back(model, folder)
    if device.type != "cpu":
        model.net.to("cpu")  # one of them at a time
    written.net.to(device)
    gap = float((probe(written, ids_BT.to(device)) - before.to(device)).abs().max())
    if not gap <= TOLERANCE:  # nor NaN
        raise StageFailed(
            f"{folder.name}: the model that was written differs from the one that was trained by "
            f"{gap:.3g} nats, at most {TOLERANCE:g} are allowed",
            "the checkpoint of the last step is kept: report this with the model's config.json",
        )
    return gap


def _widen(model: Model) -> None:
    """Make a 16-bit model that is about to be merged one of float32, in host memory."""
    net: Any = model.net
    widen(net.to("cpu"))
    if str(net.config.get_text_config()._attn_implementation).startswith("flash"):
        net.set_attn_implementation("sdpa")  # flash attention has no float32


def probe_ids(model: Model) -> Tensor:
    """Return token ids [B, T] spread over the vocabulary."""
    count = torch.arange(ROWS * LENGTH, device=model.device)
    return (count * (1 + model.valid_V // (ROWS * LENGTH)) % model.valid_V).view(ROWS, LENGTH)


@torch.no_grad()
def probe(model: Model, ids_BT: Tensor) -> Tensor:
    """Return the log-prob of each token but the first of its row, or a classifier's score of each.

    Shape [N].
    """
    hidden_BTD = model.backbone(ids_BT, use_cache=False).last_hidden_state
    if hasattr(model.net, "score"):
        return model.head(hidden_BTD).flatten().float()
    logprobs_NV = model.logits(hidden_BTD[:, :-1].flatten(0, 1)).log_softmax(-1)
    return logprobs_NV.gather(-1, ids_BT[:, 1:].reshape(-1, 1))[:, 0]


def read_back(model: Model, folder: Path) -> Model:
    """Load what was written, by transformers and peft alone, as a model of the same kind.

    Args:
        model: what it was written from.
    """
    from opdctl.models.lora import adapted

    net, adapter = model.net, model.adapter
    kept = adapter is not None and not adapter.merged
    name, options = models.location(adapter.base if kept else str(folder), False)
    written = type(net).from_pretrained(
        name,
        dtype=next(net.parameters()).dtype,
        attn_implementation=net.config.get_text_config()._attn_implementation,
        use_safetensors=True,
        **({"revision": options["revision"]} if "revision" in options else {}),
    )
    again = Model(written.train(False), model.tokenizer, str(folder))
    return adapted(again, str(folder)) if kept else again
