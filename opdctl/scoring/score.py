"""Log-probs of given tokens: one code path for the policy before its update and every teacher.

So a teacher that equals the student gives exactly zero signal in the same packing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opdctl.kernels import chunked
from opdctl.kernels.chunks import rows_in
from opdctl.models.hidden_layers import Layers, depth_of, forward_kwargs, hidden_states
from opdctl.models.model import Model
from opdctl.models.packing import micro_batches, pack
from opdctl.types import ScoreRequest


@dataclass
class Scores:
    """What a model says about the target tokens of some requests, flat and in their order.

    Attributes:
        logprobs_N: log p(target | all before it), at least fp32; None if not asked for.
        hidden_ND: the backbone's rows that predict the targets, from which a head rebuilds the
            logits (DeepSeek-V4, arXiv 2606.19348); None if not asked for.
        lse_N: log-normaliser at the temperature; None if not asked for.
        top_NK: most probable ids; None if not asked for.
        entropy_N: None if not asked for.
        modal_N, modal_id_N: log-prob and id of the most probable token; None if not asked for.
        inner_NLD: rows of the layers that belong to a student's inner ones; None if not asked for.
        at_N: log-prob of another token than the target, at its place; None if not asked for.
        above_N: mass of all tokens more probable than the target: below p, it is in the top-p
            nucleus; None if not asked for.
        top_logprob_NK: log-probs of the most probable ids; None if not asked for.
    """

    logprobs_N: Tensor | None = None
    hidden_ND: Tensor | None = None
    lse_N: Tensor | None = None
    top_NK: Tensor | None = None
    entropy_N: Tensor | None = None
    modal_N: Tensor | None = None
    modal_id_N: Tensor | None = None
    at_N: Tensor | None = None
    above_N: Tensor | None = None
    inner_NLD: Tensor | None = None
    top_logprob_NK: Tensor | None = None


# What a list of the k most probable ids with their log-probs comes from, of a model whose hidden
# rows are at hand.
LISTED = {"listed": ("hidden", "lse", "topk", "entropy"), "listed_entropy": ("topk", "top_logprob")}


def asked_of(teacher, wanted: Collection[str]) -> set[str]:
    """What is asked of a teacher, one that has hidden rows or one that gives lists."""
    if "teacher.hidden" not in teacher.provides:
        return {w for w in wanted if f"teacher.{w}" in teacher.provides}
    return {part for w in wanted for part in LISTED.get(w, (w,))}


def listed_entropy(logq_NK: Tensor) -> Tensor:
    """Entropy of a list of log-probs and one bucket for the rest: a lower bound. Shape [N]."""
    rest_N = (-logq_NK.double().exp().sum(-1)).add(1.0).clamp(min=0.0)
    return -(logq_NK.exp() * logq_NK).sum(-1) - torch.xlogy(rest_N, rest_N).to(logq_NK)


@torch.no_grad()
def score(
    model: Model,
    requests: Sequence[ScoreRequest],
    *,
    temperature: float,
    want: Collection[str] = ("logprobs",),
    top: int = 16,
    ids_N: Tensor | None = None,
    layers: Layers | None = None,
    rounded: bool = False,
    micro_batch: int = 0,
    chunk_mib: int = 0,
    check: Callable[[], None] = lambda: None,
) -> Scores:
    """Run the backbone once over the requests and return what is wanted.

    Args:
        want: any of logprobs, hidden, inner, lse, topk, top_logprob, entropy, modal, at, above.
        top: k of topk and top_logprob.
        ids_N: one id for each target: whose log-probs ``at`` is.
        layers: the student's, to whose inner ones those of ``inner`` belong.
        rounded: logits rounded to bfloat16, as in the loss.
        micro_batch: sequences per forward pass; 0 is as many as are alike in length.
        chunk_mib: memory for the logits of one chunk; 0 as in ``rows_in``.
        check: called before each forward pass; may raise to stop.
    """
    count = sum(map(len, requests))
    head = model.lm_head(temperature, rounded)
    weight_VD = head.weight_VD
    found = Scores()
    for name in {"logprobs", "lse", "entropy", "modal", "at", "above"} & set(want):
        setattr(found, f"{name}_N", weight_VD.new_zeros(count, dtype=head.logits_dtype))
    if "modal" in want:
        found.modal_id_N = weight_VD.new_zeros(count, dtype=torch.long)
    if "hidden" in want:
        found.hidden_ND = weight_VD.new_zeros(count, weight_VD.shape[1])
    if "topk" in want:
        shape = (count, min(top, head.valid_V))
        found.top_NK = weight_VD.new_zeros(shape, dtype=torch.long)
    if "top_logprob" in want:
        found.top_logprob_NK = weight_VD.new_zeros(found.top_NK.shape, dtype=head.logits_dtype)
    inner = layers.counterparts(depth_of(model)) if "inner" in want else ()
    rows, logits = rows_in(chunk_mib, head), set(want) - {"hidden", "inner"}
    for group, tokens_N in micro_batches(requests, micro_batch, model.device):
        check()
        packed = pack([requests[i] for i in group], model.pad, model.device, model.one_row)
        out = model.backbone(**packed.inputs, **forward_kwargs(inner, model))
        hidden_ND = out.last_hidden_state.flatten(0, 1)[packed.prediction_N]
        if inner:
            inner_NLD = hidden_states(model, out, packed.prediction_N, inner)
            if found.inner_NLD is None:
                found.inner_NLD = inner_NLD.new_empty(count, *inner_NLD.shape[1:])
            found.inner_NLD[tokens_N] = inner_NLD
        del out
        if found.hidden_ND is not None:
            found.hidden_ND[tokens_N] = hidden_ND
        for start in range(0, len(hidden_ND) if logits else 0, rows):
            chunk = slice(start, start + rows)
            logits_CV = head.logits(hidden_ND[chunk])
            _read(logits_CV, packed.target_N[chunk], tokens_N[chunk], found, ids_N)
    return found


def _read(
    logits_CV: Tensor, target_C: Tensor, at_C: Tensor, found: Scores, ids_N: Tensor | None
) -> None:
    """Put what is wanted of a chunk's logits in its place; overwrites them."""
    if found.modal_N is not None:
        found.modal_id_N[at_C] = logits_CV.argmax(-1)
        found.modal_N[at_C] = target_logprob(logits_CV, found.modal_id_N[at_C])
    if found.at_N is not None:
        found.at_N[at_C] = target_logprob(logits_CV, ids_N[at_C])
    if found.top_NK is not None:
        top_CK, found.top_NK[at_C] = logits_CV.topk(found.top_NK.shape[1], dim=-1)
        if found.top_logprob_NK is not None:
            found.top_logprob_NK[at_C] = top_CK - logits_CV.logsumexp(-1, keepdim=True)
    if found.logprobs_N is not None:
        found.logprobs_N[at_C] = target_logprob(logits_CV, target_C)
    if found.lse_N is not None:
        found.lse_N[at_C] = logits_CV.logsumexp(-1)
    if found.above_N is not None:
        more_CV = logits_CV > logits_CV.gather(-1, target_C[:, None])
        found.above_N[at_C] = (logits_CV.softmax(-1) * more_CV).sum(-1)
    if found.entropy_N is not None:
        found.entropy_N[at_C] = chunked.Rows(logits_CV).entropy()


def target_logprob(logits_CV: Tensor, target_C: Tensor) -> Tensor:
    """log softmax at the target ids. Shape [C]."""
    picked_C = logits_CV.gather(-1, target_C[:, None])[:, 0]
    return picked_C - logits_CV.logsumexp(-1)
