"""The answers of a step's teachers and its reference, checked on arrival and made into columns.

Each teacher is asked by requests of its own: it may be shown other ids than the student saw, while
the targets are always the student's tokens. Its answers come in the order of its requests; in the
columns they stand in the order of the rollouts' tokens, pooled where a token has several teachers.
Log-probs alone are logged (``train/wal.py``) and not asked for twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opdctl import draws
from opdctl.errors import StageFailed
from opdctl.kernels.topk import overlap_ratio
from opdctl.scoring import columns
from opdctl.scoring.asks import LOGPROBS, Asks, Pass
from opdctl.scoring.columns import column_of
from opdctl.scoring.quantities import TOPK_LIST, Quantity
from opdctl.scoring.score import Scores
from opdctl.scoring.teacher_cache import CachedTeacher, TeacherCache
from opdctl.types import FORWARD, ScoreRequest


@dataclass
class TeacherRequests:
    """The requests to one teacher in a step.

    Attributes:
        rollouts: the rollouts of the step that it scores, ascending.
        requests: one for each of them; the ids before a target may differ from the student's, the
            targets may not.
        places: its place among the teachers of each of those rollouts.
        names: of those rollouts, as messages name them.
    """

    rollouts: list[int] = field(default_factory=list)
    requests: list[ScoreRequest] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


@dataclass
class TeacherScores:
    """The answer of a step's teachers.

    Attributes:
        columns: per token of the rollouts, [N], or [N, M] where they say which teacher.
        cache: heads and hidden rows, or lists; None where log-probs and the like were all.
        tokens: read by the teachers.
        flops: spent on them.
    """

    columns: dict[str, Tensor]
    cache: TeacherCache | None = None
    tokens: int = 0
    flops: float = 0.0

    def count(self, requests: list[ScoreRequest], parameters: int) -> None:
        """Add what a model of that size read."""
        forwarded = sum(len(request.ids) for request in requests)
        self.tokens += forwarded
        self.flops += FORWARD * parameters * forwarded


class _Table:
    """The per-token numbers of all teachers, [N, M], in the order of the rollouts' tokens."""

    def __init__(self, requests_by_teacher: dict[str, TeacherRequests], like: Tensor) -> None:
        lengths, self.M = {}, 1
        for mine in requests_by_teacher.values():
            lengths |= dict(zip(mine.rollouts, map(len, mine.requests), strict=True))
            self.M = max(self.M, 1 + max(mine.places))
        sizes = [lengths[i] for i in range(len(lengths))]
        self.N, self.like = sum(sizes), like
        self.token_N = torch.arange(self.N, device=like.device).split(sizes)
        self.weight_NM = like.new_zeros(self.N, self.M)
        shape = (2, self.N, self.M)
        self.index_NM, self.row_NM = like.new_zeros(shape, dtype=torch.long)
        self.values: dict[str, Tensor] = {}

    def places(self, mine: TeacherRequests) -> tuple[Tensor, Tensor]:
        """Return where the answers of one teacher stand: their tokens and its place. [n] each."""
        tokens = [self.token_N[i] for i in mine.rollouts]
        places = zip(tokens, mine.places, strict=True)
        return torch.cat(tokens), torch.cat([torch.full_like(t, place) for t, place in places])

    def put(self, name: str, where: tuple[Tensor, Tensor], value_N: Tensor) -> None:
        """Put one teacher's numbers in their place."""
        if name not in self.values:
            dtype = self.like.dtype if value_N.is_floating_point() else value_N.dtype
            self.values[name] = self.like.new_zeros(self.N, self.M, dtype=dtype)
        self.values[name][where] = value_N.to(self.values[name].dtype)

    def pooled(self, name: str) -> Tensor:
        """Return the mean over each token's teachers by weight. Shape [N]."""
        total_N, value_NM = self.weight_NM.sum(1), self.values[name]
        mean_N = (self.weight_NM * value_NM).sum(1) / torch.where(total_N > 0, total_N, 1.0)
        return torch.where(total_N > 0, mean_N, value_NM[:, 0])

    def column(self, row: Quantity) -> Tensor:
        """Return the column of a quantity, [N].

        Raises:
            StageFailed: it cannot be pooled, and a token has several teachers.
        """
        if row.pooled == "mean":
            # sum of w (log T - log S) is their total times (weighted mean of log T, minus log S)
            return self.pooled(row.need)
        if self.M > 1:
            raise StageFailed(
                f"teacher.{row.need} has no mean over several teachers: {row.doc}",
                "pooled=false: one teacher for each domain",
            )
        return self.values[row.need][:, 0]


def score_by_teachers(
    requests_by_teacher: dict[str, TeacherRequests],
    teachers: dict[str, tuple[Any, float]],
    asks: Asks,
    run: Pass,
    log: Any,
    *,
    like: Tensor,
    ours_NK: Tensor | None = None,
) -> TeacherScores:
    """Ask the teachers of a step.

    Args:
        requests_by_teacher: in the order of the teachers' indices; every rollout is in one of them.
        teachers: members of ``teachers/`` and their weights.
        log: a write-ahead log: ``get`` and ``put``.
        like: a tensor of the student's device and the type of its log-probs.
        ours_NK: the policy's most probable ids, where its overlap with theirs is wanted.

    Raises:
        StageFailed: a teacher answered short or with something that is not finite.
    """
    table, cached = _Table(requests_by_teacher, like), []
    answer, numbers = TeacherScores({}), [row for row in asks.numbers if row.pooled != "kept"]
    for name, mine in requests_by_teacher.items():
        teacher, weight = teachers[name]
        its_asks = asks.of_teacher(teacher.provides)
        scores, parameters = _ask(name, teacher, mine.requests, its_asks, run, log, like.device)
        check_scores(name, scores, mine)
        where = table.places(mine)
        table.weight_NM[where] = weight
        for need in (row.need for row in numbers if row.need in scores.per_token):
            table.put(need, where, scores.per_token[need])
        if ours_NK is not None:
            assert scores.top_NK is not None, "an overlap is of the most probable ids of both"
            overlap_N = _overlap(ours_NK[where[0]], scores.top_NK)
            table.put(columns.DRIFT_OVERLAP, where, overlap_N.to(like.dtype))
        entry = _cached(name, teacher, mine.requests, its_asks, scores, run)
        if entry is not None:
            table.index_NM[where] = len(cached)
            table.row_NM[where] = torch.arange(len(where[0]), device=like.device)
            cached.append(entry)
        answer.count(mine.requests, parameters)
    answer.columns[columns.TEACHER_WEIGHT] = table.weight_NM.sum(1)
    for row in numbers:
        answer.columns[column_of("teacher", row.need)] = table.column(row)
    if ours_NK is not None:
        answer.columns[columns.DRIFT_OVERLAP] = table.pooled(columns.DRIFT_OVERLAP)
    if cached:
        answer.columns[columns.TEACHER_INDEX] = table.index_NM
        answer.columns[columns.TEACHER_ROW] = table.row_NM
        answer.columns[columns.PAIR_WEIGHT] = table.weight_NM
        answer.cache = TeacherCache(cached, like.device)
    return answer


def score_by_reference(
    requests: list[ScoreRequest],
    names: list[str],
    reference: Any,
    run: Pass,
    log: Any,
    *,
    like: Tensor,
    top1_id_N: Tensor | None = None,
) -> TeacherScores:
    """Ask the reference, which is the same for all rollouts: the column ``reference`` and, of the
    teacher's most probable tokens, ``reference_top1``.

    Args:
        names: of the rollouts, as messages name them.
        top1_id_N: those tokens.

    Raises:
        StageFailed: it answered short or with something that is not finite.
    """
    question = ("/reference", reference, requests, LOGPROBS)  # no teacher's name
    scores, parameters = _ask(*question, run, log, like.device, top1_id_N)
    check_scores("reference", scores, TeacherRequests(requests=requests, names=names))
    answer = TeacherScores({columns.REFERENCE: scores.logprobs_N})
    if scores.other_N is not None:
        answer.columns[columns.REFERENCE_TOP1] = scores.other_N
    answer.count(requests, parameters)
    return answer


def _cached(
    name: str, teacher: Any, requests: list[ScoreRequest], asks: Asks, scores: Scores, run: Pass
) -> CachedTeacher | None:
    """Return what is kept of a teacher for the update: a list, or its rows and the head."""
    if scores.hidden_ND is None and TOPK_LIST in asks:
        top_NK, top_logprob_NK = scores.top_list()
        target_N = [[q.ids[t]] for q in requests for t in q.targets]
        ids_NJ = torch.cat([torch.tensor(target_N).to(top_NK), top_NK], -1)
        logq_NJ = torch.cat([scores.logprobs_N[:, None], top_logprob_NK], -1)
        return CachedTeacher(top_NK=top_NK, name=name, listed=(ids_NJ, logq_NJ))
    if scores.hidden_ND is None and scores.inner_NLD is None:
        return None
    return CachedTeacher(
        teacher.head(run.temperature, run.rounded) if asks.head else None,
        scores.hidden_ND,
        scores.per_token.get("lse"),
        scores.top_NK,
        scores.per_token.get("entropy"),
        teacher.stored,
        scores.inner_NLD,
        name,
    )


def _overlap(ours_NK: Tensor, theirs_NK: Tensor, rows: int = 1 << 16) -> Tensor:
    """Return the overlap of both sides' most probable ids, some rows at a time. Shape [N]."""
    pairs = zip(ours_NK.split(rows), theirs_NK[:, : ours_NK.shape[1]].split(rows), strict=True)
    return torch.cat([overlap_ratio(*pair) for pair in pairs])


def _ask(
    name: str,
    teacher: Any,
    requests: list[ScoreRequest],
    asks: Asks,
    run: Pass,
    log: Any,
    device: torch.device,
    other_ids_N: Tensor | None = None,
) -> tuple[Scores, int]:
    """Return a teacher's scores and its parameters. Log-probs alone are logged and not paid for
    twice: a teacher that answered before the kill need not even be loaded. One that keeps its own
    answers logs each as it comes."""
    if not asks.logprobs_alone or other_ids_N is not None or teacher.keeps:
        rest = () if other_ids_N is None else (other_ids_N,)
        return teacher.score(requests, asks, run, *rest), teacher.parameters
    question = f"teacher {name} {draws.key(requests, run.temperature):016x}"
    logged = log.get(question)
    if logged:
        logprobs_N = torch.from_numpy(logged[0]["logprobs"]).to(device)
        return Scores({"logprobs": logprobs_N}), int(logged[0]["size"])
    scores = teacher.score(requests, asks, run)
    if torch.isfinite(scores.logprobs_N).all():
        arrays = {"logprobs": scores.logprobs_N.cpu().numpy()}
        log.put(question, arrays | {"size": np.array(teacher.parameters)})
    return scores, teacher.parameters


def require_same_targets(
    by_teacher: dict[str, TeacherRequests], requests: list[ScoreRequest]
) -> None:
    """Check that teachers which are shown other ids than the student still score its tokens.

    Args:
        requests: the student's own, of the step's rollouts in their order.

    Raises:
        StageFailed: a teacher would score other tokens.
    """
    for name, mine in by_teacher.items():
        for rollout, request, label in zip(mine.rollouts, mine.requests, mine.names, strict=True):
            if request is not requests[rollout] and targets(request) != targets(requests[rollout]):
                raise StageFailed(
                    f"teacher {name} is asked for other tokens than those of {label}",
                    "what it is shown may differ before the response and between its turns",
                )


def targets(request: ScoreRequest) -> list[int]:
    """Return the ids that a request scores."""
    return [request.ids[place] for place in request.targets]


def check_scores(name: str, scores: Scores, mine: TeacherRequests) -> None:
    """Check the length and the finiteness of a teacher's scores.

    Raises:
        StageFailed: it answered short or with something that is not finite; names the rollout.
    """
    ends = list(accumulate(map(len, mine.requests)))
    for value_N in scores.parts():
        if len(value_N) != ends[-1]:
            raise StageFailed(
                f"teacher {name} scored {len(value_N)} of {ends[-1]} tokens, "
                f"from {mine.names[0]} on",
                "it must score every token of a response it is sent",
            )
        bad_N = ~torch.isfinite(value_N.view(ends[-1], -1)).all(1)
        if bad_N.any():
            first = int(bad_N.nonzero()[0, 0])
            owner = next(i for i, end in enumerate(ends) if first < end)
            hint = "its weights or its precision: try runtime.dtype=float32"
            if value_N.ndim == 1 and value_N[first] == -torch.inf:
                hint = "it gives it probability 0: objectives: {divergence: {direction: forward}}"
            raise StageFailed(
                f"teacher {name} gave a score that is not finite in {mine.names[owner]}", hint
            )
