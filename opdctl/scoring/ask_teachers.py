"""What the teachers and the reference of a step answer, checked on arrival and put in its columns.

Each rollout goes to the teachers of its domain. Their answers come by teacher; in the columns they
stand in the order of the rollouts' tokens, pooled where a token has several. Log-probs alone are
logged (``train/wal.py``) and not asked for twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from opdctl import draws
from opdctl.errors import StageFailed
from opdctl.kernels.topk import overlap_ratio
from opdctl.scoring.score import Scores, asked_of, listed_entropy
from opdctl.scoring.teacher_cache import CachedTeacher, TeacherCache
from opdctl.train.context import Context
from opdctl.types import FORWARD, Compute, Rollout, ScoreRequest

if TYPE_CHECKING:
    from opdctl.train.step import Step, TrainSetup


def score_by_teachers(
    step: Step,
    requests: list[ScoreRequest],
    parts: TrainSetup,
    ctx: Context,
    compute: Compute,
    ours_NK: Tensor | None,
) -> None:
    """Ask each rollout's teachers; fill ``teacher``, ``teacher_*`` and ``step.teacher_cache``.

    Args:
        requests: of the rollouts, in their order.
        ours_NK: the policy's most probable ids, where its overlap with theirs is wanted.

    Raises:
        StageFailed: a teacher answered short or with something that is not finite.
    """
    device, wide = step.sequence_N.device, step.model.logits_dtype
    lengths = list(map(len, requests))
    token_N = torch.arange(sum(lengths), device=device).split(lengths)
    columns, N = step.columns, sum(lengths)
    routes = [parts.route[r.prompt.domain] for r in step.rollouts]
    M = max(len(names) for names in routes)
    index_NM, row_NM = torch.zeros(2, N, M, dtype=torch.long, device=device)
    weight_NM = torch.zeros(N, M, dtype=wide, device=device)
    logprob_NM, entropy_NM = torch.zeros_like(weight_NM), torch.zeros_like(weight_NM)
    overlap_NM, above_NM = torch.zeros_like(weight_NM), torch.zeros_like(weight_NM)
    modal_N, modal_id_N = torch.zeros_like(weight_NM[:, 0]), torch.zeros_like(index_NM[:, 0])
    listed_NM = torch.zeros_like(weight_NM)
    held: list[CachedTeacher] = []
    for name, (teacher, weight) in parts.teachers.items():
        mine = [i for i, names in enumerate(routes) if name in names]
        if not mine:
            continue
        asked = [requests[i] for i in mine]
        wants = tuple(sorted(asked_of(teacher, parts.teacher_wants)))
        found, parameters = _asked(name, teacher, asked, parts, ctx, device, wants)
        _check(name, found, [step.rollouts[i] for i in mine])
        at_N = torch.cat([token_N[i] for i in mine])
        place_N = torch.cat([torch.full_like(token_N[i], routes[i].index(name)) for i in mine])
        weight_NM[at_N, place_N] = weight
        if found.logprobs_N is not None:
            logprob_NM[at_N, place_N] = found.logprobs_N
        if found.entropy_N is not None:
            entropy_NM[at_N, place_N] = found.entropy_N
        if found.modal_N is not None:
            modal_N[at_N], modal_id_N[at_N] = found.modal_N, found.modal_id_N
        if found.above_N is not None:
            above_NM[at_N, place_N] = found.above_N
        if ours_NK is not None:
            overlap_NM[at_N, place_N] = _overlap(ours_NK[at_N], found.top_NK).to(wide)
        if "listed_entropy" in parts.teacher_wants:
            listed_NM[at_N, place_N] = listed_entropy(found.top_logprob_NK)
        if found.hidden_ND is None and "listed" in wants:
            index_NM[at_N, place_N] = len(held)
            row_NM[at_N, place_N] = torch.arange(len(at_N), device=at_N.device)
            target_N1 = torch.tensor([[q.ids[t]] for q in asked for t in q.targets]).to(at_N)
            ids_NJ = torch.cat([target_N1, found.top_NK], -1)
            logq_NJ = torch.cat([found.logprobs_N[:, None], found.top_logprob_NK], -1)
            held.append(CachedTeacher(top_NK=found.top_NK, name=name, listed=(ids_NJ, logq_NJ)))
        if found.hidden_ND is not None or found.inner_NLD is not None:
            index_NM[at_N, place_N] = len(held)
            row_NM[at_N, place_N] = torch.arange(len(at_N), device=at_N.device)
            head = None
            if parts.rebuilds:
                head = teacher.head(parts.temperature, ctx.runtime.rounded_logits)
            kept = (found.hidden_ND, found.lse_N, found.top_NK, found.entropy_N)
            held.append(CachedTeacher(head, *kept, teacher.stored, found.inner_NLD, name))
        for i in mine:
            step.rollouts[i].teacher = "+".join(routes[i])
        forwarded = sum(len(q.ids) for q in asked)
        compute.teacher_tokens += forwarded
        compute.flops["teacher"] += FORWARD * parameters * forwarded
    total_N = weight_NM.sum(1)
    columns["teacher_weight"] = total_N

    def mean(value_NM: Tensor) -> Tensor:
        mean_N = (weight_NM * value_NM).sum(1) / torch.where(total_N > 0, total_N, 1.0)
        return torch.where(total_N > 0, mean_N, value_NM[:, 0])

    if "logprobs" in parts.teacher_wants:
        # sum of w (log T - log S) is their total times (weighted mean of log T, minus log S)
        columns["teacher"] = mean(logprob_NM)
    if "entropy" in parts.teacher_wants:
        columns["teacher_entropy"] = mean(entropy_NM)
    if "above" in parts.teacher_wants:
        columns["teacher_above"] = mean(above_NM)
    if ours_NK is not None:
        columns["drift_overlap"] = mean(overlap_NM)
    if "listed_entropy" in parts.teacher_wants:
        columns["teacher_listed_entropy"] = mean(listed_NM)
    if "modal" in parts.teacher_wants:
        columns |= {"teacher_modal": modal_N, "modal_id": modal_id_N}
    if held:
        columns |= {"teacher_index": index_NM, "teacher_row": row_NM, "pair_weight": weight_NM}
        step.teacher_cache = TeacherCache(held, device)


def _overlap(ours_NK: Tensor, theirs_NK: Tensor, rows: int = 1 << 16) -> Tensor:
    """The overlap of both sides' most probable ids, some rows at a time. Shape [N]."""
    pairs = zip(ours_NK.split(rows), theirs_NK[:, : ours_NK.shape[1]].split(rows), strict=True)
    return torch.cat([overlap_ratio(*pair) for pair in pairs])


def score_by_reference(
    step: Step, requests: list[ScoreRequest], parts: TrainSetup, ctx: Context, compute: Compute
) -> None:
    """Ask the reference, which is the same for all rollouts: the columns ``reference`` and, of the
    teacher's most probable token, ``reference_modal``.

    Raises:
        StageFailed: it answered short or with something that is not finite.
    """
    device = step.sequence_N.device
    asked, ids_N = ("/reference", parts.reference, requests), None  # no teacher's name
    if "modal" in parts.reference_wants:
        ids_N = step.columns["modal_id"]
    wants = ("logprobs", "at") if ids_N is not None else ("logprobs",)
    found, parameters = _asked(*asked, parts, ctx, device, wants, ids_N)
    _check("reference", found, step.rollouts)
    step.columns["reference"] = found.logprobs_N
    if ids_N is not None:
        step.columns["reference_modal"] = found.at_N
    forwarded = sum(len(q.ids) for q in requests)
    compute.teacher_tokens += forwarded
    compute.flops["teacher"] += FORWARD * parameters * forwarded


def _asked(
    name: str, teacher, asked, parts, ctx, device, wants: tuple[str, ...], ids_N=None
) -> tuple[Scores, int]:
    """What a teacher says, and its parameters; log-probs alone are logged and not paid for twice:
    a teacher that answered before the kill need not even be loaded. One that keeps its own answers
    logs each as it comes."""
    question = f"teacher {name} {draws.key(asked, parts.temperature):016x}"
    logged = ctx.wal.get(question) if wants == ("logprobs",) and not teacher.keeps else []
    if logged:
        return Scores(torch.from_numpy(logged[0]["logprobs"]).to(device)), int(logged[0]["size"])
    given = (asked, parts.temperature, wants, parts.teacher_top)
    if "inner" in wants:
        found = teacher.score(*given, layers=parts.layers)
    else:
        found = teacher.score(*given) if ids_N is None else teacher.score(*given, ids_N)
    if wants == ("logprobs",) and not teacher.keeps and torch.isfinite(found.logprobs_N).all():
        size = np.array(teacher.parameters)
        ctx.wal.put(question, {"logprobs": found.logprobs_N.cpu().numpy(), "size": size})
    return found, teacher.parameters


def _check(name: str, found: Scores, rollouts: list[Rollout]) -> None:
    """Length and finiteness of what a teacher said."""
    owner = [r for r in rollouts for _ in range(r.length)]
    flat = ("logprobs_N", "lse_N", "entropy_N", "modal_N", "at_N", "above_N")
    for what in ("hidden_ND", "inner_NLD", "top_logprob_NK", *flat):
        value_N = getattr(found, what)
        if value_N is None:
            continue
        if len(value_N) != len(owner):
            raise StageFailed(
                f"teacher {name} scored {len(value_N)} of {len(owner)} tokens, "
                f"from {rollouts[0].name} on",
                "it must score every token of a response it is sent",
            )
        bad_N = ~torch.isfinite(value_N.view(len(owner), -1)).all(1)
        if bad_N.any():
            first = int(bad_N.nonzero()[0, 0])
            raise StageFailed(
                f"teacher {name} gave a score that is not finite in {owner[first].name}",
                "its weights or its precision: try runtime.dtype=float32",
            )
