"""How two models agree, token by token, on the same text: the signature of Rethinking OPD (arXiv
2604.13016). Where OPD succeeds the overlap of the two top-k sets grows, what is left to gain on
them goes to zero, and their entropies close up; where it fails the overlap stays.

Objectives with the teacher's logits at hand, or as many of its top ids, log these numbers in every
step (``loss/token_view.py``). Elsewhere they are measured here, on some rollouts of some steps, in
forward passes of their own: nothing that is trained sees them, and the ledger of compute does not
count them. A teacher that gives no more than log-probs, or lists fewer ids, is left out, not zero.
k is ``top_of`` everywhere, whatever the k of the loss, and stands in the row as ``overlap_k``. The
texts are the student's own: where a step trains on others' only, the ``NAMES`` are not in its row.

    runtime.log_overlap_every=1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opdctl.kernels.chunked import Rows
from opdctl.kernels.chunks import rows_in
from opdctl.kernels.head import Head
from opdctl.kernels.reference import divergence
from opdctl.kernels.topk import overlap_numbers
from opdctl.models.model import Model
from opdctl.scoring.score import score
from opdctl.types import ScoreRequest

TOP = 16  # k of the paper
NAMES = ("overlap", "overlap_mass", "overlap_teacher_mass", "overlap_advantage", "entropy_gap")


def top_of(head: Head) -> int:
    """k: the paper's, or an eighth of a small vocabulary, so that chance does not make it."""
    return max(1, min(TOP, head.valid_V // 8))


@torch.no_grad()
def agreement(
    ours_ND: Tensor,
    our_head: Head,
    theirs_ND: Tensor,
    their_head: Head,
    *,
    size: int,
    divergences: bool = False,
) -> dict[str, Tensor]:
    """Per token: overlap, overlap_mass, overlap_teacher_mass, overlap_advantage, entropy,
    teacher_entropy, entropy_gap. [N] each.

    Args:
        ours_ND, theirs_ND: last hidden rows of the two, which may differ in width.
        size: rows of a chunk of logits.
        divergences: reverse (KL of ours to theirs) and forward too.
    """
    table: dict[str, list[Tensor]] = {}
    for ours_CD, theirs_CD in zip(ours_ND.split(size), theirs_ND.split(size), strict=True):
        sides = [Rows(our_head.logits(ours_CD)), Rows(their_head.logits(theirs_CD))]
        ours_CK, theirs_CK = (side.top(top_of(our_head)) for side in sides)
        logp_CK, logq_CK = (side.at(theirs_CK, leaf=False) for side in sides)
        found = overlap_numbers(logp_CK, logq_CK, ours_CK, theirs_CK)
        found["entropy"], found["teacher_entropy"] = (side.entropy() for side in sides)
        found["entropy_gap"] = (found["teacher_entropy"] - found["entropy"]).abs()
        if divergences:
            for direction in ("reverse", "forward"):
                logs = (side.logp_CV for side in sides)
                found[direction] = divergence(*logs, direction)
        for name, value_C in found.items():
            table.setdefault(name, []).append(value_C)
    return {name: torch.cat(parts) for name, parts in table.items()}


def compared(
    ctx: Any, student: Model, teacher: Model, requests: Sequence[ScoreRequest], temperature: float
) -> tuple[dict[str, Tensor], list[tuple[Tensor, Head]]]:
    """``agreement`` of two models on some requests, with the divergences; and of both the hidden
    rows and the head that it was made of.

    Raises:
        Interrupted: a stop was asked for.
    """
    sides = [
        (_hidden(ctx, model, requests, temperature), model.lm_head(temperature))
        for model in (student, teacher)
    ]
    size = max(1, rows_in(ctx.runtime.chunk_mib, sides[0][1]) // 4)  # the definition keeps more
    return agreement(*sides[0], *sides[1], size=size, divergences=True), sides


def logged(ctx: Any, student: Model, parts: Any, rollouts: list) -> dict[str, float]:
    """Means over the tokens of at most ``runtime.log_rollouts`` of the rollouts that the student
    wrote; empty where it wrote none, or no teacher gives more than log-probs.

    Raises:
        Interrupted: a stop was asked for.
    """
    own = [r for r in rollouts if r.source == "student"]
    apart = max(1, -(-len(own) // ctx.runtime.log_rollouts))
    chosen, seen = own[::apart], []
    for name, (teacher, _) in parts.teachers.items():
        requests = [r.request for r in chosen if name in parts.route[r.prompt.domain]]
        if not requests or "teacher.hidden" not in teacher.provides:
            continue
        ours_ND = _hidden(ctx, student, requests, parts.temperature)
        theirs_ND = teacher.score(requests, parts.temperature, ("hidden",)).hidden_ND
        heads = [m.lm_head(parts.temperature) for m in (student, teacher.model)]
        size = rows_in(ctx.runtime.chunk_mib, heads[0])
        seen.append(agreement(ours_ND, heads[0], theirs_ND, heads[1], size=size))
    whole = {n: torch.cat([table[n] for table in seen]) for n in (seen[0] if seen else ())}
    return {name: float(value_N.mean()) for name, value_N in whole.items()}


def _hidden(ctx: Any, model: Model, requests: Sequence[ScoreRequest], temperature: float) -> Tensor:
    found = score(
        model,
        requests,
        temperature=temperature,
        want=("hidden",),
        micro_batch=ctx.runtime.micro_batch,
        check=ctx.check,
    )
    return found.hidden_ND
