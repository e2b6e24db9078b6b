"""The pairs of a token and a teacher of it, ordered by teacher.

A routed token has one teacher and is one pair. Where teachers are pooled a token is a pair with
each of them: its divergence is their weighted sum, everything else about it counts once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opdctl.loss.token_view import LossTerm
from opdctl.models.packing import per_sequence
from opdctl.scoring.columns import PAIR_WEIGHT, TEACHER_INDEX


def order_by_teacher(kept_N: Tensor, tokens_N: Tensor, columns: dict) -> tuple[Tensor, Tensor]:
    """Return pairs of the kept tokens in the order of their teachers: tokens and places.

    The first teacher of a token is always there, one of no weight otherwise never.
    """
    M = columns[TEACHER_INDEX].shape[1]
    token_P = kept_N.repeat_interleave(M)
    place_P = torch.arange(M, device=kept_N.device).repeat(len(kept_N))
    at_P = tokens_N[token_P]
    counts_P = (columns[PAIR_WEIGHT][at_P, place_P] != 0) | (place_P == 0)
    order_P = columns[TEACHER_INDEX][at_P, place_P].argsort(stable=True)
    order_P = order_P[counts_P[order_P]]
    return token_P[order_P], place_P[order_P]


def gather_columns(
    columns: dict[str, Tensor], where_P: Tensor, place_P: Tensor
) -> dict[str, Tensor]:
    """Return columns at the tokens of the pairs, a teacher's at that teacher. [P] each."""
    return {
        name: column[where_P, place_P] if column.ndim == 2 else column[where_P]
        for name, column in columns.items()
    }


def once_per_token(term: LossTerm, factor_P: Tensor, place_P: Tensor) -> Tensor:
    """Return a term's factors on the pairs: one that compares with teachers acts on every pair,
    another once a token."""
    beside = ("teacher.hidden", "teacher.topk_list")
    if any(need.startswith(beside) for need in term.objective.needs):
        return factor_P
    return torch.where(place_P == 0, factor_P, 0.0)


def pooled_mean(value_P: Tensor, weight_P: Tensor, where_P: Tensor, count: int) -> Tensor:
    """Return the mean over each token's pairs by weight; 0 where it has none. Shape [N]."""
    weight_N = per_sequence(weight_P, where_P, count)
    total_N = per_sequence(weight_P * value_P, where_P, count)
    return total_N / torch.where(weight_N > 0, weight_N, 1.0)
