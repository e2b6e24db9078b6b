"""The per-token numbers that a model can give of the tokens it scores: one row of the table each.

A row is all that a new number takes. What teachers provide, the pass over a model's logits
(score.py), the check on arrival, the pooling and the column (ask_teachers.py) loop over the table;
a member that declares ``teacher.NEED`` reads the column ``column_of("teacher", "NEED")``. No torch
at module level: teachers declare what they provide without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Quantity:
    """A number per token.

    Attributes:
        need: its name, as in ``teacher.NEED``.
        doc: the meaning, in a line.
        of: ``(logits_CV, target_C) -> [C]``, from a chunk of logits at the temperature; None where
            it comes out of a list alone.
        pooled: the rule for a token with several teachers: their mean by weight, or refuse. A kept
            number has no column and stays with its teacher in the ``TeacherCache``.
        of_list: ``(ids_NK, logprob_NK) -> [N]``, from a list of the most probable ids, in
            descending order, which is all that a server gives; None where a list does not tell.
        list_size: entries of the list that it needs; 0 is as many as are asked for.
        integer: the numbers are ids.
        overwrites: ``of`` destroys the logits, so it is called last. One row at most.
    """

    need: str
    doc: str
    of: Callable[[Tensor, Tensor], Tensor] | None
    pooled: Literal["mean", "refuse", "kept"] = "mean"
    of_list: Callable[[Tensor, Tensor], Tensor] | None = None
    list_size: int = 0
    integer: bool = False
    overwrites: bool = False


def target_logprob(logits_CV: Tensor, target_C: Tensor) -> Tensor:
    """Return log softmax at the target ids. Shape [C]."""
    picked_C = logits_CV.gather(-1, target_C[:, None])[:, 0]
    return picked_C - logits_CV.logsumexp(-1)


def mass_above(logits_CV: Tensor, target_C: Tensor) -> Tensor:
    """Return the mass of all tokens more probable than the target. Shape [C]."""
    more_CV = logits_CV > logits_CV.gather(-1, target_C[:, None])
    return (logits_CV.softmax(-1) * more_CV).sum(-1)


def entropy(logits_CV: Tensor, target_C: Tensor) -> Tensor:
    """Return the entropy over the vocabulary; the logits are overwritten. Shape [C]."""
    from opdctl.kernels.chunked import Rows

    return Rows(logits_CV).entropy()


def list_entropy(logq_NK: Tensor) -> Tensor:
    """Return the entropy of a list of log-probs and one bucket for the rest: a lower bound. [N]."""
    import torch

    rest_N = (-logq_NK.double().exp().sum(-1)).add(1.0).clamp(min=0.0)
    from opdctl.kernels.reference import entropy as entropy_of

    return entropy_of(logq_NK) - torch.xlogy(rest_N, rest_N).to(logq_NK)


_ROWS = (
    Quantity("logprobs", "log p(target | all before it)", target_logprob),
    Quantity(
        "lse",
        "log-normaliser at the temperature: with it a log-prob needs one row of the head",
        lambda logits_CV, target_C: logits_CV.logsumexp(-1),
        pooled="kept",
    ),
    Quantity(
        "top1",
        "log-prob of the most probable token",
        lambda logits_CV, target_C: logits_CV.amax(-1) - logits_CV.logsumexp(-1),
        pooled="refuse",
        of_list=lambda ids_NK, logprob_NK: logprob_NK[:, 0],
        list_size=1,
    ),
    Quantity(
        "top1_id",
        "id of the most probable token",
        lambda logits_CV, target_C: logits_CV.argmax(-1),
        pooled="refuse",
        of_list=lambda ids_NK, logprob_NK: ids_NK[:, 0],
        list_size=1,
        integer=True,
    ),
    Quantity(
        "mass_above",
        "mass of all tokens more probable than the target: below p, it is in the top-p nucleus",
        mass_above,
    ),
    Quantity("entropy", "entropy over the vocabulary", entropy, overwrites=True),
    Quantity(
        "topk_list_entropy",
        "entropy of the k most probable tokens and one bucket for the rest",
        None,
        of_list=lambda ids_NK, logprob_NK: list_entropy(logprob_NK),
    ),
)

QUANTITIES = {row.need: row for row in _ROWS}

# What a model gives that is more than one number per token.
HIDDEN = "hidden"  # rows of the last layer, from which a head rebuilds the logits (2606.19348)
INNER = "inner"  # rows of layers before it
TOPK = "topk"  # the k most probable ids
TOPK_LOGPROBS = "topk_logprobs"  # their log-probs
TOPK_LIST = "topk_list"  # both, as a list that a server gives or what rebuilds more than a list

REBUILT = frozenset({HIDDEN, "lse", TOPK, "entropy"})  # in place of a list, where rows are at hand

LOCAL = tuple(f"teacher.{need}" for need in (HIDDEN, TOPK, TOPK_LIST, *QUANTITIES))
LISTING = ("logprobs", TOPK_LIST, *(q.need for q in _ROWS if q.of_list))
SERVED = tuple(f"teacher.{need}" for need in LISTING)
