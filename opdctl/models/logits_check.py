"""Is what is computed here what the model itself computes? Looked at when a model is loaded.

The backbone's rows go through a head of our own (``kernels/head.py``), which knows a softcap and a
factor. An architecture that does more between backbone and logits is refused, not computed wrongly.
"""

from __future__ import annotations

from typing import Any

import torch

from opdctl.errors import UsageError


def shaped(config: Any) -> tuple[float | None, float]:
    """What a model does to the logits of its head: softcap (Gemma), factor (Cohere, Granite)."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return getattr(config, "final_logit_softcapping", None), scale


@torch.no_grad()
def require_own_logits(model: Any) -> None:
    """The logits computed here are the model's own, and no token sees a later one; on six tokens.

    Raises:
        UsageError: they are not; says by how much they differ.
    """
    ids_BT = torch.arange(6, device=model.device).expand(2, 6) % model.valid_V
    ids_BT = torch.cat([ids_BT[:1], ids_BT[1:] * (torch.arange(6, device=model.device) < 5)])
    hidden_BTD = model.backbone(ids_BT).last_hidden_state
    ours, own = model.lm_head().logits(hidden_BTD.flatten(0, 1)), model.own_logits(ids_BT)
    own = own.flatten(0, 1)[:, : ours.shape[1]].to(ours.dtype)
    exact = next(model.net.parameters()).dtype.itemsize >= 4
    most = 1e-3 if exact else 3e-2
    size, gap = float(own.abs().max()), float((ours - own).abs().max())
    later = float((hidden_BTD[0, :-1] - hidden_BTD[1, :-1]).abs().max())
    what = ""
    if gap > most * size:
        what = f"its logits, at most {size:.3g}, are off from its own by {gap:.3g}"
    elif later > most * float(hidden_BTD.abs().max()):
        what = f"a token of it sees later ones (its state changes by {later:.3g})"
    if what:
        kind = model.net.config.model_type
        raise UsageError(
            f"{model.name}: the architecture {kind} is not supported: {what}",
            "a causal language model whose logits are a linear head, scaled and softcapped",
        )


@torch.no_grad()
def keeps_apart(model: Any, required: bool) -> bool:
    """Whether two sequences in one row, told apart by their positions alone, do not see each other.

    Raises:
        UsageError: they do, and ``required`` says that they must not.
    """
    ids_BT = torch.arange(10, device=model.device)[None] % model.valid_V
    position_BT = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]], device=model.device)
    own = {"use_cache": False}
    row_TD = model.backbone(ids_BT, position_ids=position_BT, **own).last_hidden_state[0, 4:]
    alone_TD = model.backbone(ids_BT[:, 4:], **own).last_hidden_state[0]
    most = 1e-3 if next(model.net.parameters()).dtype.itemsize >= 4 else 3e-2
    apart = float((row_TD - alone_TD).abs().max()) <= most * float(alone_TD.abs().max())
    if required and not apart:
        raise UsageError(
            f"{model.name}: sequences in one row see each other in {model.net.config.model_type}",
            "runtime.packing=padded",
        )
    return apart
