"""A check at load time that the logits computed here are those the model itself computes.

The backbone's rows go through a head of our own (``kernels/head.py``), which knows a softcap and a
factor. An architecture that does more between backbone and logits is refused, not computed wrongly.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from opdctl.errors import UsageError

FAR = 1 << 16  # a position, where a model says no limit


def softcap_and_scale(config: Any) -> tuple[float | None, float]:
    """Return the softcap (Gemma) and the factor (Cohere, Granite) of a model's logits."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return getattr(config, "final_logit_softcapping", None), scale


@torch.no_grad()
def require_own_logits(model: Any) -> None:
    """Check on six tokens that logits are the model's own and that a token sees those before alone.

    It may see no later one, nor how long a sequence beside its own is.

    Raises:
        UsageError: either does not hold; says by how much.
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
    longer = _moved_by_a_longer_one(model, ids_BT)
    problem = ""
    if gap > most * size:
        problem = f"its logits, at most {size:.3g}, are off from its own by {gap:.3g}"
    elif later > most * float(hidden_BTD.abs().max()):
        problem = f"a token of it sees later ones (its state changes by {later:.3g})"
    elif longer > most * float(hidden_BTD.abs().max()):
        problem = (
            f"beside a sequence of {model.room.longest or FAR} tokens a shorter one has other "
            f"states (by {longer:.3g})"
        )
    if problem:
        kind = model.net.config.model_type
        raise UsageError(
            f"{model.name}: the architecture {kind} is not supported: {problem}",
            "a causal language model whose logits are a linear head, scaled and softcapped",
        )


def _moved_by_a_longer_one(model: Any, ids_BT: Tensor) -> float:
    """Return by how much the states of a sequence change beside the longest that the model reads.

    The longer one is the last tokens of such a sequence: only its positions are far.
    """
    if "position_ids" not in inspect.signature(model.net.base_model.forward).parameters:
        return 0.0
    end = model.room.longest or FAR
    T = ids_BT.shape[1]
    near_T = torch.arange(T, device=ids_BT.device)
    states = [
        model.backbone(ids_BT, position_ids=torch.stack([near_T, last_T])).last_hidden_state[0]
        for last_T in (near_T, near_T + max(0, end - T))
    ]
    return float((states[0] - states[1]).abs().max())


@torch.no_grad()
def isolates_packed_sequences(model: Any, required: bool) -> bool:
    """Return True if two sequences in one row, separated only by positions, do not see each other.

    Raises:
        UsageError: they see each other, and ``required`` is set.
    """
    ids_BT = torch.arange(10, device=model.device)[None] % model.valid_V
    position_BT = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]], device=model.device)
    own = {"use_cache": False}
    row_TD = model.backbone(ids_BT, position_ids=position_BT, **own).last_hidden_state[0, 4:]
    alone_TD = model.backbone(ids_BT[:, 4:], **own).last_hidden_state[0]
    most = 1e-3 if next(model.net.parameters()).dtype.itemsize >= 4 else 3e-2
    isolated = float((row_TD - alone_TD).abs().max()) <= most * float(alone_TD.abs().max())
    if required and not isolated:
        raise UsageError(
            f"{model.name}: sequences in one row see each other in {model.net.config.model_type}",
            "runtime.packing=padded",
        )
    return isolated
