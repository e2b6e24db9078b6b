"""Divergences on k ids of the vocabulary instead of all: three forms, and what each is.

    tail          k ids and one bucket with the rest of the mass. A lower bound of the full
                  divergence (data processing); equal to it at k = V; its gradient is dense.
    generalised   sum over the k ids of p r - p + q, the un-normalised form of the MOPD paper. A
                  lower bound, equal at k = V; ignores how the mass outside is spread.
    renormalised  both renormalised on the k ids, as verl and ms-swift do. Not a bound: it can
                  exceed the full divergence, and it is blind to mass that leaves the k ids.

p and q are normalised over the whole vocabulary in all three.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opdctl.kernels.reference import divergence

ABSENT = -1e4  # a log-mass whose exponential is 0 in every precision, without 0 x infinity


def divergence_on(
    logp_CK: Tensor, logq_CK: Tensor, keep_CK: Tensor, form: str, direction: str, beta: float
) -> Tensor:
    """Reverse KL, forward KL or JSD on k ids in one of the three forms. Shape [C].

    Args:
        logp_CK: the student's log-probs at the ids; differentiable.
        logq_CK: the teacher's.
        keep_CK: False for an id that stands there twice.
    """
    logp_CK = torch.where(keep_CK, logp_CK, ABSENT)
    logq_CK = torch.where(keep_CK, logq_CK, ABSENT)
    if form == "tail":
        logp_CK = torch.cat([logp_CK, log_tail(logp_CK)], -1)
        logq_CK = torch.cat([logq_CK, log_tail(logq_CK)], -1)
    elif form == "renormalised":
        logp_CK, logq_CK = logp_CK.log_softmax(-1), logq_CK.log_softmax(-1)
    return divergence(logp_CK, logq_CK, direction, beta)


def log_tail(logp_CK: Tensor) -> Tensor:
    """Log of the mass outside the ids, at least the rounding of one. Shape [C, 1]."""
    inside_C1 = logp_CK.logsumexp(-1, keepdim=True)
    return (-torch.expm1(inside_C1.clamp(max=-torch.finfo(logp_CK.dtype).eps))).log()


def union(ours_CK: Tensor, theirs_CK: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets of ids, [C, 2K], and which to keep: an id of both counts once."""
    again_CK = (theirs_CK[:, :, None] == ours_CK[:, None, :]).any(-1)
    keep_CK = torch.cat([torch.ones_like(again_CK), ~again_CK], -1)
    return torch.cat([ours_CK, theirs_CK], -1), keep_CK
