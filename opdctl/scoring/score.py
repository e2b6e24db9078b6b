"""The one pass of a model over tokens: of the policy before its update and of every teacher, so a
teacher that equals the student gives exactly zero signal in the same packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opdctl.kernels.chunks import rows_in
from opdctl.kernels.head import Head
from opdctl.models.hidden_layers import depth_of, forward_kwargs, hidden_states
from opdctl.models.model import Model
from opdctl.models.packing import micro_batches, pack
from opdctl.scoring.asks import LOGPROBS, PLAIN, Asks, Pass
from opdctl.scoring.quantities import HIDDEN, INNER, TOPK, TOPK_LOGPROBS, target_logprob
from opdctl.types import ScoreRequest


@dataclass
class Scores:
    """A model's answer about the target tokens of some requests, flat and in their order. What was
    not asked for is None.

    Attributes:
        per_token: the quantities asked for, [N] each, at least fp32.
        hidden_ND: the backbone's rows that predict the targets, from which a head rebuilds the
            logits (DeepSeek-V4, arXiv 2606.19348).
        inner_NLD: rows of the layers that belong to a student's inner ones.
        top_NK: most probable ids.
        top_logprob_NK: their log-probs.
        other_N: log-prob of another token than the target, at its place.
    """

    per_token: dict[str, Tensor] = field(default_factory=dict)
    hidden_ND: Tensor | None = None
    inner_NLD: Tensor | None = None
    top_NK: Tensor | None = None
    top_logprob_NK: Tensor | None = None
    other_N: Tensor | None = None

    @property
    def logprobs_N(self) -> Tensor:
        """The log-probs of the targets."""
        return self.per_token["logprobs"]

    def rows(self) -> Tensor:
        """Return the hidden rows, which were asked for. Shape [N, D]."""
        assert self.hidden_ND is not None, "hidden rows are asked for by name"
        return self.hidden_ND

    def top_list(self) -> tuple[Tensor, Tensor]:
        """Return the most probable ids and their log-probs, which were asked for. [N, K] each."""
        assert self.top_NK is not None, "a list is asked for by name"
        assert self.top_logprob_NK is not None, "a list is asked for with its log-probs"
        return self.top_NK, self.top_logprob_NK

    def parts(self) -> list[Tensor]:
        """Return all that is there, each with one row per token."""
        rows = (self.hidden_ND, self.inner_NLD, self.top_logprob_NK, self.other_N)
        return [part for part in (*rows, *self.per_token.values()) if part is not None]

    def read_list(self, asks: Asks) -> None:
        """Set the quantities that come out of the list of most probable ids."""
        for row in asks.numbers:
            if row.of_list and row.need not in self.per_token:
                self.per_token[row.need] = row.of_list(*self.top_list())


@torch.no_grad()
def score(
    model: Model,
    requests: Sequence[ScoreRequest],
    asks: Asks = LOGPROBS,
    run: Pass = PLAIN,
    other_ids_N: Tensor | None = None,
) -> Scores:
    """Run the backbone once over the requests and return what is asked.

    Args:
        other_ids_N: one id for each target, whose log-probs are wanted too.
    """
    count = sum(map(len, requests))
    head = model.lm_head(run.temperature, run.rounded)
    scores = _allocated(head, count, asks, other_ids_N)
    inner: tuple[int, ...] = ()
    if INNER in asks:
        assert asks.layers is not None, "inner rows are those of some layers"
        inner = asks.layers.counterparts(depth_of(model))
    reads_logits = other_ids_N is not None or bool(asks.quantities - {HIDDEN, INNER})
    rows = rows_in(run.chunk_mib, head)
    for group, tokens_N in micro_batches(requests, run.micro_batch, model.device):
        run.check()
        packed = pack([requests[i] for i in group], model.pad, model.device, model.one_row)
        out = model.backbone(**packed.inputs, **forward_kwargs(inner, model))
        hidden_ND = out.last_hidden_state.flatten(0, 1)[packed.prediction_N]
        if inner:
            inner_NLD = hidden_states(model, out, packed.prediction_N, inner)
            if scores.inner_NLD is None:
                scores.inner_NLD = inner_NLD.new_empty(count, *inner_NLD.shape[1:])
            scores.inner_NLD[tokens_N] = inner_NLD
        del out
        if scores.hidden_ND is not None:
            scores.hidden_ND[tokens_N] = hidden_ND
        for start in range(0, len(hidden_ND) if reads_logits else 0, rows):
            chunk = slice(start, start + rows)
            at_C = tokens_N[chunk]
            other_C = None if other_ids_N is None else other_ids_N[at_C]
            logits_CV = head.logits(hidden_ND[chunk])
            _write_scores(scores, asks, logits_CV, packed.target_N[chunk], other_C, at_C)
    scores.read_list(asks)
    return scores


def _allocated(head: Head, count: int, asks: Asks, other_ids_N: Tensor | None) -> Scores:
    """Return scores of zeros for what is asked; inner rows are as wide as the model says."""
    scores, weight_VD = Scores(), head.weight_VD
    for row in asks.numbers:
        if row.of is not None:
            dtype = torch.long if row.integer else head.logits_dtype
            scores.per_token[row.need] = weight_VD.new_zeros(count, dtype=dtype)
    if HIDDEN in asks:
        scores.hidden_ND = weight_VD.new_zeros(count, weight_VD.shape[1])
    listed = TOPK_LOGPROBS in asks or any(row.of is None for row in asks.numbers)
    shape = (count, min(asks.top, head.valid_V))
    if TOPK in asks or listed:
        scores.top_NK = weight_VD.new_zeros(shape, dtype=torch.long)
    if listed:
        scores.top_logprob_NK = weight_VD.new_zeros(shape, dtype=head.logits_dtype)
    if other_ids_N is not None:
        scores.other_N = weight_VD.new_zeros(count, dtype=head.logits_dtype)
    return scores


def _write_scores(
    scores: Scores,
    asks: Asks,
    logits_CV: Tensor,
    target_C: Tensor,
    other_C: Tensor | None,
    at_C: Tensor,
) -> None:
    """Put what is asked of a chunk's logits in its place; overwrites them."""
    if scores.other_N is not None and other_C is not None:
        scores.other_N[at_C] = target_logprob(logits_CV, other_C)
    if scores.top_NK is not None:
        top_CK, scores.top_NK[at_C] = logits_CV.topk(scores.top_NK.shape[1], dim=-1)
        if scores.top_logprob_NK is not None:
            scores.top_logprob_NK[at_C] = top_CK - logits_CV.logsumexp(-1, keepdim=True)
    for row in sorted(asks.numbers, key=lambda row: row.overwrites):
        if row.of is not None:
            scores.per_token[row.need][at_C] = row.of(logits_CV, target_C)
