"""The agreement of two models, token by token, on the same text: the signature of Rethinking OPD
(arXiv 2604.13016). Where OPD succeeds the overlap of the two top-k sets grows, what is left to gain
on them goes to zero, and their entropies close up; where it fails the overlap stays.

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
from opdctl.scoring.ask_teachers import TeacherRequests
from opdctl.scoring.asks import Asks, Pass
from opdctl.scoring.quantities import HIDDEN
from opdctl.scoring.score import score
from opdctl.types import Rollout, ScoreRequest

TOP = 16  # k of the paper
ROWS = Asks.of(HIDDEN)
NAMES = ("overlap", "overlap_mass", "overlap_teacher_mass", "overlap_advantage", "entropy_gap")


def top_of(head: Head) -> int:
    """Return k: the paper's, or an eighth of a small vocabulary, where chance would make it."""
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
    """Return per token overlap, overlap_mass, overlap_teacher_mass, overlap_advantage, entropy,
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
        numbers = overlap_numbers(logp_CK, logq_CK, ours_CK, theirs_CK)
        numbers["entropy"], numbers["teacher_entropy"] = (side.entropy() for side in sides)
        numbers["entropy_gap"] = (numbers["teacher_entropy"] - numbers["entropy"]).abs()
        if divergences:
            for direction in ("reverse", "forward"):
                numbers[direction] = divergence(sides[0].logp_CV, sides[1].logp_CV, direction)
        for name, value_C in numbers.items():
            table.setdefault(name, []).append(value_C)
    return {name: torch.cat(chunks) for name, chunks in table.items()}


def compared(
    ctx: Any, student: Model, teacher: Model, requests: Sequence[ScoreRequest], temperature: float
) -> tuple[dict[str, Tensor], list[tuple[Tensor, Head]]]:
    """Return ``agreement`` of two models on some requests, with the divergences; and of both the
    hidden rows and the head that it was made of.

    Raises:
        Interrupted: a stop was asked for.
    """
    run = Pass.of(ctx, temperature)
    sides = [
        (score(model, requests, ROWS, run).rows(), model.lm_head(temperature))
        for model in (student, teacher)
    ]
    (ours_ND, our_head), (theirs_ND, their_head) = sides
    size = max(1, rows_in(run.chunk_mib, our_head) // 4)  # the definition keeps more
    rows = (ours_ND, our_head, theirs_ND, their_head)
    return agreement(*rows, size=size, divergences=True), sides


def logged(
    student: Model,
    teachers: dict[str, tuple[Any, float]],
    requests_by_teacher: dict[str, TeacherRequests],
    rollouts: list[Rollout],
    run: Pass,
    most: int,
) -> dict[str, float]:
    """Return means over the tokens of at most ``most`` of the rollouts that the student wrote;
    nothing where it wrote none, or no teacher gives more than log-probs.

    Raises:
        Interrupted: a stop was asked for.
    """
    own = [i for i, rollout in enumerate(rollouts) if rollout.source == "student"]
    apart = max(1, -(-len(own) // most))
    chosen, tables = set(own[::apart]), []
    for name, mine in requests_by_teacher.items():
        teacher, _ = teachers[name]
        pairs = zip(mine.rollouts, mine.requests, strict=True)
        requests = {i: request for i, request in pairs if i in chosen}
        if not requests or "teacher.hidden" not in teacher.provides:
            continue
        ours_ND = score(student, [rollouts[i].request for i in requests], ROWS, run).rows()
        theirs_ND = teacher.score([*requests.values()], ROWS, run).rows()
        heads = [m.lm_head(run.temperature) for m in (student, teacher.model)]
        size = rows_in(run.chunk_mib, heads[0])
        tables.append(agreement(ours_ND, heads[0], theirs_ND, heads[1], size=size))
    whole = {n: torch.cat([t[n] for t in tables]) for n in (tables[0] if tables else ())}
    return {name: float(value_N.mean()) for name, value_N in whole.items()}
