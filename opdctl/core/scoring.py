"""Log-probs of given tokens: one code path for the policy before its update and every teacher.

So a teacher that equals the student gives exactly zero signal in the same packing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from opdctl.core.chunks import rows_in
from opdctl.core.models import Model
from opdctl.core.tokens import micro_batches, pack
from opdctl.types import ScoreRequest


@torch.no_grad()
def logprobs(
    model: Model,
    requests: Sequence[ScoreRequest],
    *,
    temperature: float,
    micro_batch: int = 0,
    chunk_mib: int = 256,
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """log p(target | all before it), at a temperature. Flat, [N], in at least fp32.

    Args:
        micro_batch: sequences per forward pass; 0 is all.
        chunk_mib: memory for the logits of one chunk.
        check: called before each forward pass; may raise to stop.
    """
    spans = [(request.ids, request.start) for request in requests]
    count = sum(len(ids) - start for ids, start in spans)
    out_N = torch.zeros(count, dtype=torch.get_default_dtype(), device=model.device)
    rows = rows_in(chunk_mib, model.head.weight.shape[0])
    for group, tokens_N in micro_batches(spans, micro_batch, model.device):
        check()
        packed = pack([spans[i] for i in group], model.pad, model.device)
        hidden = model.trunk(packed.ids_BT).last_hidden_state
        hidden_ND = hidden.flatten(0, 1)[packed.prediction_N]
        for start in range(0, len(hidden_ND), rows):
            chunk = slice(start, start + rows)
            logits_CV = model.logits(hidden_ND[chunk], temperature)
            out_N[tokens_N[chunk]] = target_logprob(logits_CV, packed.target_N[chunk])
    return out_N


def target_logprob(logits_CV: Tensor, target_C: Tensor) -> Tensor:
    """log softmax at the target ids. Shape [C]."""
    picked_C = logits_CV.gather(-1, target_C[:, None])[:, 0]
    return picked_C - logits_CV.logsumexp(-1)
