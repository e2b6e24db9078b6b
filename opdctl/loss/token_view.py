"""The view that objectives and gates have of a chunk of tokens, and their weighted sum.

Per-token weights are inputs, because the gradient is formed before backward: masks, normalisers
and coefficients are in them already. Nothing here divides by a count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from opdctl.kernels.chunks import Chunk, chunked_sum
from opdctl.kernels.head import Head
from opdctl.kernels.topk import overlap_numbers, union
from opdctl.models.hidden_layers import LAST, Layers
from opdctl.scoring.columns import (
    ADVANTAGE,
    FIXED_ADVANTAGE,
    POLICY,
    TEACHER_INDEX,
    TEACHER_ROW,
)
from opdctl.scoring.overlap import top_of
from opdctl.scoring.teacher_cache import FINITE, TeacherCache


@dataclass
class PerStep:
    """A part of a weight that sees the whole step: worked out once, then read from its column.

    Attributes:
        column: where its numbers are kept.
        of: the weight's own ``mask`` or ``factor``, step -> [N].
    """

    column: str
    of: MethodType

    @property
    def logged(self) -> dict[str, float]:
        """The numbers that its weight logs of the step it saw last, if any."""
        weight: Any = self.of.__self__
        return weight.logged

    def mask(self, columns: dict[str, Tensor]) -> Tensor:
        """Return its numbers for the tokens of some columns."""
        return columns[self.column]


@dataclass
class LossTerm:
    """An objective of the loss, with what scales it.

    Attributes:
        objective: has ``rows`` (prediction or token) and ``loss(view) -> [C]``.
        coef: factor in the loss.
        normalise: seq_mean, token_mean or domain_mean.
        masks: with ``mask(columns) -> [N]``; they enter the count.
        factors: likewise; they do not enter it.
        gates: members of ``weights/`` with ``gate(view) -> [C]``; like factors, they are not
            counted by the normaliser.
        needs: what those members need.
    """

    objective: Any
    coef: float = 1.0
    normalise: str = "seq_mean"
    masks: list = field(default_factory=list)
    gates: list = field(default_factory=list)
    factors: list = field(default_factory=list)
    needs: set = field(default_factory=set)

    @property
    def reads_logits(self) -> bool:
        """The need of logits: none where hidden states are compared, unless a gate reads some."""
        return bool(self.gates) or not any("student.hidden" in n for n in self.objective.needs)


@dataclass
class TopK:
    """A chunk on the k most probable ids of a side.

    Attributes:
        logp_CK: the student's log-probs there; differentiable.
        logq_CK: the teacher's.
        keep_CK: False for an id that stands there twice (union: K is 2k).
        tails: log of the mass outside the ids, differentiable and the teacher's, [C] each; None
            if not asked for.
        holds_C: the target is one of them.
        teacher_C: the teacher's log-prob of the target.
    """

    logp_CK: Tensor
    logq_CK: Tensor
    keep_CK: Tensor
    tails: tuple[Tensor, Tensor] | None
    holds_C: Tensor
    teacher_C: Tensor


class TokenView:
    """The view that an objective or a gate has of one chunk of C tokens: never its logits.

    Everything but ``entropy_C`` and the columns is differentiable.

    Args:
        columns: per-token vectors, [C] each.
        teacher_cache: what the tokens' teachers left behind, if anything here reads it.
        layers: whose hidden states are compared.
        credits: signals whose credit follows the policy, and their coefficients.
    """

    def __init__(
        self,
        chunk: Chunk,
        target_C: Tensor,
        columns: dict[str, Tensor],
        teacher_cache: TeacherCache | None,
        layers: Layers = LAST,
        credits: Sequence[tuple[float, Any]] = (),
    ) -> None:
        self.chunk, self.target_C = chunk, target_C
        self.columns, self.layers = columns, layers
        self._cache, self._credits = teacher_cache, credits
        self.logged: dict[str, Tensor] = {}

    @property
    def teacher_cache(self) -> TeacherCache:
        """The hidden rows, heads and lists of the tokens' teachers."""
        assert self._cache is not None, "an objective that reads a teacher says so by its needs"
        return self._cache

    @property
    def rows(self) -> Any:
        """The row pass of the chunk's logits."""
        return self.chunk.rows

    def states(self, which: str) -> Tensor:
        """Return the policy's hidden states on layers named as in a need, [C, L, D]."""
        each = list(self.chunk.inner_CLD.unbind(1)) if self.layers.inner else []
        places = self.layers.state_indices(which)
        if len(each) in places:
            each.append(self.chunk.hidden_CD)
        return torch.stack([each[p] for p in places], 1)

    def teacher_states(self, which: str) -> list[tuple[slice, str, Tensor]]:
        """Return those of the tokens' own teachers, on the layers that belong to the policy's: for
        each run of tokens of one teacher the slice, its name and [run, L, its width]."""
        return list(
            self.teacher_cache.states(*self._teacher_rows, self.layers.state_indices(which))
        )

    @cached_property
    def logprob_C(self) -> Tensor:
        """The log-prob of the target under the policy being trained."""
        return self.rows.at(self.target_C[:, None])[:, 0]

    @cached_property
    def entropy_C(self) -> Tensor:
        """The entropy of the policy being trained; no gradient."""
        return self.rows.entropy()

    @property
    def score_C(self) -> Tensor:
        """Score of a classifier, one per token."""
        return self.rows.score_C

    @property
    def old_C(self) -> Tensor:
        """The log-prob of the target under the policy as it was when the rollouts were made.

        With one update per rollout that is the policy being trained, and no pass is spent on it.
        """
        return self.columns[POLICY] if POLICY in self.columns else self.logprob_C.detach()

    @cached_property
    def advantage_C(self) -> Tensor:
        """The advantage, without a gradient: that of the rollouts' making, or, where the credit of
        a signal follows the policy, with its credit as it is now."""
        if not self._credits:
            return self.columns[ADVANTAGE]
        live_C = sum(coef * signal.credit_now(self) for coef, signal in self._credits)
        return self.columns[FIXED_ADVANTAGE] + live_C

    @property
    def _teacher_rows(self) -> tuple[Tensor, Tensor]:
        """The teacher of each token, and its row of that teacher."""
        return self.columns[TEACHER_INDEX], self.columns[TEACHER_ROW]

    def divergence(self, direction: str, beta: float, overlap: bool = True) -> Tensor:
        """Return the divergence to the token's own teacher on the whole vocabulary, [C], >= 0.

        Logs it, both entropies, both log-probs of the target, and with ``overlap`` the share of the
        teacher's ``scoring.overlap.top_of`` most probable tokens that are among the student's, with
        the mass of those under both.
        """
        teacher_CV = self.teacher_cache.logits(*self._teacher_rows)
        ids_CK = self.target_C[:, None]
        if overlap:
            top_CK = teacher_CV.topk(top_of(self.chunk.head), dim=-1).indices
            ids_CK = torch.cat([ids_CK, top_CK], -1)
        value_C, entropy_C, logq_CK = self.rows.divergence(teacher_CV, direction, beta, ids_CK)
        self.require_finite(value_C)
        logp_CK = self.rows.at(ids_CK, leaf=False)
        ours_CK = self.rows.top(ids_CK.shape[1] - 1) if overlap else None
        self.log("divergence", value_C)
        self._log_both(ids_CK, logp_CK, logq_CK, ours_CK, entropy_C)
        return value_C

    def topk(self, support: str, k: int, overlap: bool = True, tails: bool = False) -> TopK:
        """Return both sides at the k most probable ids of a side. Logs what ``divergence`` does,
        the overlap where the k ids hold as many as it is of.

        Args:
            support: topk_student, topk_teacher or topk_union.
            tails: the mass outside the ids is wanted too.
        """
        theirs_CK = self.teacher_cache.gather("top_NK", *self._teacher_rows)[:, :k]
        k, seen = theirs_CK.shape[1], top_of(self.chunk.head)
        ours_CK = self.rows.top(k)
        ids_CK, keep_CK = union(ours_CK, theirs_CK)
        starts = {"topk_student": (0, k), "topk_teacher": (k, 2 * k), "topk_union": (0, 2 * k)}
        part = slice(*starts[support])
        if support != "topk_union":
            keep_CK = torch.ones_like(keep_CK[:, part])
        logp_CK = self.rows.at(ids_CK)
        first = k if support == "topk_teacher" else 0  # the student's ids are not asked for
        asked_CK = torch.cat([self.target_C[:, None], ids_CK[:, first:]], -1)
        outside_CK = ids_CK[:, part] if tails else None
        logq_CK, tail_C = self.teacher_cache.logprobs_at(*self._teacher_rows, asked_CK, outside_CK)
        seen_CK = torch.cat([self.target_C[:, None], theirs_CK[:, :seen]], -1)
        theirs_logq_CK = logq_CK[:, 1 + k - first :]
        seen_logq_CK = torch.cat([logq_CK[:, :1], theirs_logq_CK[:, :seen]], -1)
        known = self.teacher_cache.has_all("entropy_N")
        entropy_C = self.teacher_cache.gather("entropy_N", *self._teacher_rows) if known else None
        seen_logp_CK = self.rows.at(seen_CK, leaf=False)
        seen_ours_CK = ours_CK[:, :seen] if overlap and seen <= k else None
        self._log_both(seen_CK, seen_logp_CK, seen_logq_CK, seen_ours_CK, entropy_C)
        holds_C = (ids_CK[:, part] == self.target_C[:, None]).any(-1)
        both = (self.rows.outside(outside_CK), tail_C) if tail_C is not None else None
        theirs = slice(part.start - first, part.stop - first)
        here = (logp_CK[:, part], logq_CK[:, 1:][:, theirs], keep_CK, both)
        return TopK(*here, holds_C, logq_CK[:, 0])

    def _log_both(self, ids_CK, logp_CK, logq_CK, ours_CK, entropy_C) -> None:
        """Log entropies, log-probs of the target (first id), overlap of the rest with ours."""
        self.log("entropy", self.entropy_C)
        if entropy_C is not None:
            self.log("teacher_entropy", entropy_C)
            self.log("entropy_gap", (entropy_C - self.entropy_C).abs())
        self.log("student_logprob", logp_CK[:, 0])
        self.log("teacher_logprob", logq_CK[:, 0])
        if ours_CK is not None:
            numbers = overlap_numbers(logp_CK[:, 1:], logq_CK[:, 1:], ours_CK, ids_CK[:, 1:])
            for name, value_C in numbers.items():
                self.log(name, value_C)

    def require_finite(self, value_C: Tensor, hint: str = FINITE) -> None:
        """Check that no teacher makes a loss infinite, see ``TeacherCache.require_finite``."""
        self.teacher_cache.require_finite(value_C, self.columns[TEACHER_INDEX], hint)

    def __getitem__(self, column: str) -> Tensor:
        return self.advantage_C if column == ADVANTAGE else self.columns[column]

    def log(self, name: str, value_C: Tensor) -> None:
        """Keep a per-token value; metrics report its mean."""
        self.logged[name] = value_C.detach()


def weighted_sum(
    hidden_ND: Tensor,
    head: Head,
    target_N: Tensor,
    columns: dict[str, Tensor],
    terms: list[tuple[LossTerm, Tensor]],
    *,
    rows_of: type,
    size: int,
    teacher_cache: TeacherCache | None = None,
    layers: Layers = LAST,
    inner_NLD: Tensor | None = None,
    credits: Sequence[tuple[float, Any]] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum over tokens and terms of weight x gates x loss, in bounded memory.

    Args:
        hidden_ND: rows of the backbone; with teachers, in ascending order of ``teacher_index``.
        target_N: the supervised ids.
        columns: per-token vectors, [N] each.
        terms: objectives with the weight of each token, [N].
        rows_of: level of the row pass.
        size: most rows of a chunk.
        layers: whose hidden states are compared.
        inner_NLD: rows of the inner ones.
        credits: signals whose credit follows the policy, and their coefficients.

    Returns:
        The sum, and the table of what was logged per token, detached, [N] each.
    """
    table: dict[str, Tensor] = {}

    def loss_of(chunk: Chunk, part: slice) -> Tensor:
        cut = {name: column[part] for name, column in columns.items()}
        view = TokenView(chunk, target_N[part], cut, teacher_cache, layers, credits)
        loss_C = hidden_ND.new_zeros((), dtype=head.logits_dtype)
        for term, weight_N in terms:
            part_C = weight_N[part] * term.objective.loss(view)
            for gate in term.gates:
                part_C = part_C * gate.gate(view)
            loss_C = loss_C + part_C
        for name, value_C in view.logged.items():
            if name not in table:
                table[name] = value_C.new_zeros(len(hidden_ND))
            table[name][part] = value_C
        return loss_C

    reads_logits = any(term.reads_logits for term, _ in terms)
    return chunked_sum(loss_of, hidden_ND, head, rows_of, size, reads_logits, inner_NLD), table
