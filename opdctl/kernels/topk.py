"""Divergences on k ids of the vocabulary instead of all: four forms, and what each is.

    tail          k ids and one bucket with the rest of the mass. A lower bound of the full
                  divergence (data processing); equal to it at k = V; its gradient is dense.
    generalised   sum over the k ids of p r - p + q, the un-normalised form of the MOPD paper. A
                  lower bound, equal at k = V; ignores how the mass outside is spread.
    renormalised  both renormalised on the k ids, as verl and ms-swift do. Not a bound: it can
                  exceed the full divergence, and it is blind to mass that leaves the k ids.
    truncated     the teacher renormalised on the k ids and 0 elsewhere, the student as it is: the
                  forward KL to a truncated teacher (EOPD, arXiv 2603.07079). Forward only; its
                  gradient is dense; it sees mass that leaves the k ids.

p and q come in normalised over the whole vocabulary in all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opdctl.kernels.reference import ABSENT, GONE, divergence


def divergence_on(
    logp_CK: Tensor,
    logq_CK: Tensor,
    keep_CK: Tensor,
    form: str,
    direction: str,
    beta: float,
    tails: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return reverse KL, forward KL or JSD on k ids in one of the forms. Shape [C].

    Args:
        logp_CK: the student's log-probs at the ids; differentiable.
        logq_CK: the teacher's.
        keep_CK: False for an id that stands there twice.
        tails: for the forms tail and truncated, log of the mass outside the ids under both, [C]
            each. It is summed over the ids outside: one minus the mass inside would lose a
            confident token's tail, and its gradient, to rounding.
    """
    logp_CK = torch.where(keep_CK, logp_CK, ABSENT)
    logq_CK = torch.where(keep_CK, logq_CK, ABSENT)
    if form in ("tail", "truncated"):
        assert tails is not None, "both have a bucket for the mass outside"
        logp_CK = torch.cat([logp_CK, tails[0][:, None]], -1)
        if form == "tail":
            logq_CK = torch.cat([logq_CK, tails[1][:, None]], -1)
        else:
            logq_CK = torch.nn.functional.pad(_renormalised(logq_CK), (0, 1), value=ABSENT)
    elif form == "renormalised":
        logp_CK, logq_CK = _renormalised(logp_CK), _renormalised(logq_CK)
    return divergence(logp_CK, logq_CK, direction, beta)


def _renormalised(log_CK: Tensor) -> Tensor:
    """Return log-masses that add up to one over the ids; an id without mass gets none."""
    return torch.where(log_CK > GONE, log_CK.clamp(min=ABSENT).log_softmax(-1), ABSENT)


def log_outside(logits_CV: Tensor, ids_CK: Tensor) -> Tensor:
    """Log of the sum of e^logits over all but some ids, finite where there are none. Shape [C].

    The buffer is used and given back as it was.
    """
    inside_CK = logits_CV.gather(-1, ids_CK)
    logits_CV.scatter_(-1, ids_CK, -torch.inf)
    outside_C = logits_CV.logsumexp(-1).clamp(min=ABSENT)
    logits_CV.scatter_(-1, ids_CK, inside_CK)
    return outside_C


def share_outside(logits_CV: Tensor, ids_CK: Tensor, outside_C: Tensor) -> Tensor:
    """Return each id's share of the mass outside: the gradient of ``log_outside``. [C, V]."""
    inside_CK = logits_CV.gather(-1, ids_CK)
    logits_CV.scatter_(-1, ids_CK, -torch.inf)
    share_CV = (logits_CV - outside_C[:, None]).exp_()
    logits_CV.scatter_(-1, ids_CK, inside_CK)
    return share_CV


def among(ids_CK: Tensor, others_CK: Tensor) -> Tensor:
    """Return True for ids that are among the others of their row. Shape [C, K]."""
    return (ids_CK[:, :, None] == others_CK[:, None, :]).any(-1)


def overlap_ratio(ours_CK: Tensor, theirs_CK: Tensor) -> Tensor:
    """The share of the ids that both sides have, |S_p and S_q| / k, for sets of one size. [C].

    The overlap ratio of Rethinking OPD (arXiv 2604.13016), and what Prune-OPD (arXiv 2605.07804)
    calls drift where it is small.
    """
    return among(theirs_CK, ours_CK).to(torch.get_default_dtype()).mean(-1)


def union(ours_CK: Tensor, theirs_CK: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sets of ids, [C, 2K], and which to keep: an id of both counts once."""
    again_CK = among(theirs_CK, ours_CK)
    keep_CK = torch.cat([torch.ones_like(again_CK), ~again_CK], -1)
    return torch.cat([ours_CK, theirs_CK], -1), keep_CK


def overlap_numbers(
    logp_CK: Tensor, logq_CK: Tensor, ours_CK: Tensor, theirs_CK: Tensor
) -> dict[str, Tensor]:
    """Return how two sides agree on their k most probable ids (arXiv 2604.13016). [C] each.

    On S, the ids that both have: ``overlap``, |S| / k; the mass of S under either side; and the
    mean over S of p (log q - log p), both renormalised on S, ``overlap_advantage``: never positive,
    0 where the two agree on S, or S is empty.

    Args:
        logp_CK: log-probs of a side at the other's ids, ``theirs_CK``; normalised over all ids.
        logq_CK: the other's.
        ours_CK: the k most probable ids of the side of ``logp_CK``.
    """
    logp_CK, logq_CK = logp_CK.detach(), logq_CK.detach()
    both_CK = among(theirs_CK, ours_CK)
    kl_C = divergence_on(logp_CK, logq_CK, both_CK, "renormalised", "reverse", 0.5)
    count_C = both_CK.sum(-1)
    return {
        "overlap": overlap_ratio(ours_CK, theirs_CK),
        "overlap_mass": (logp_CK.exp() * both_CK).sum(-1),
        "overlap_teacher_mass": (logq_CK.exp() * both_CK).sum(-1),
        "overlap_advantage": -kl_C / torch.where(count_C > 0, count_C, 1),
    }
