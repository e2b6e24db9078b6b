"""The setup that a stage gives to the loop, and one step: rollouts and what is known of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opdctl.loss.token_view import LossTerm
from opdctl.models.model import Model
from opdctl.models.packing import (
    cumulative_sum,
    discounted_future_sum,
    per_sequence,
    token_positions,
)
from opdctl.protocols import Live
from opdctl.scoring.ask_teachers import TeacherRequests
from opdctl.scoring.asks import LOGPROBS, NOTHING, Asks
from opdctl.scoring.teacher_cache import TeacherCache
from opdctl.train.update import Batch
from opdctl.types import Rollout, ScoreRequest


@dataclass
class TrainSetup:
    """All that a stage gives to the loop.

    Attributes:
        source: ``draw(step) -> [Rollout]``; for the ledger ``sampled`` (tokens of the last draw),
            ``parameters`` of the sampler and ``samples_from`` (student, teacher, dataset).
        terms: the objectives.
        signals: ``{name: (coef, member)}``; their weighted sum is the advantage.
        rewards: called on all rollouts of a step.
        teachers: ``{name: (member, weight)}``; scores come back as the column ``teacher``.
        route: domain -> names of its teachers; several where they are pooled.
        controllers: ``read(step)`` before an update or ``act(done)`` after it, or both.
        reference: a frozen model the log-ratio is taken to (the column ``reference``).
        teacher_asks: what the teachers are asked; each number becomes a column.
        reference_asks: what the reference is asked: logprobs, and top1, which here is its log-prob
            of the teacher's most probable token. Nothing without a reference.
        policy_asks: what a no-grad pass of the student before the update is asked: numbers, which
            become columns, hidden for ``policy_kl_top``, and topk for the overlap with the
            teacher's (the column ``drift_overlap``). Nothing where no pass is made.
        policy_kl_top: k of the policy's divergence to the teacher (the column ``policy_kl``); 0 is
            the whole vocabulary, None where nothing reads it.
        judged: a member reads each response's verdict (the column ``right``).
        temperature: of the loss, on both sides.
        sampled_at: the one sampled with.
        steps: optimizer steps of the stage, for what changes on the way.
        updates: passes over the step's rollouts.
        minibatches: optimizer steps in each.
    """

    source: Any
    terms: list[LossTerm]
    signals: dict[str, tuple[float, Any]] = field(default_factory=dict)
    rewards: list[Any] = field(default_factory=list)
    teachers: dict[str, tuple[Any, float]] = field(default_factory=dict)
    route: dict[str, list[str]] = field(default_factory=dict)
    controllers: dict[str, Any] = field(default_factory=dict)
    reference: Any = None
    teacher_asks: Asks = LOGPROBS
    reference_asks: Asks = NOTHING
    policy_asks: Asks = NOTHING
    policy_kl_top: int | None = None
    judged: bool = False
    temperature: float = 1.0
    sampled_at: float = 1.0
    steps: int = 1
    updates: int = 1
    minibatches: int = 1

    def batch(
        self,
        spans: list[ScoreRequest],
        columns: dict[str, Tensor],
        cache: TeacherCache | None,
        terms: list[LossTerm] | None = None,
    ) -> Batch:
        """Return the batch of some rollouts of a step.

        Args:
            cache: what the step's teachers left behind.
            terms: some of the objectives; None is all of them.
        """
        return Batch(
            spans=spans,
            columns=columns,
            terms=self.terms if terms is None else terms,
            teacher_cache=cache,
            layers=self.teacher_asks.layers,
            credits=self.live_signals,
        )

    @property
    def live_signals(self) -> list[tuple[float, Live]]:
        """The signals whose credit follows the policy through the updates of a step."""
        return [(c, s) for c, s in self.signals.values() if isinstance(s, Live) and s.live]


@dataclass
class Step:
    """All rollouts of one step and their per-token columns, flat and in their order.

    Attributes:
        teacher_cache: a head and hidden rows of each teacher asked; the columns ``teacher_index``
            and ``teacher_row``, [N, M], say which rows of which teachers belong to a token.
        teacher_requests: what the teachers were asked.
        model: the policy, for its tokenizer and vocabulary.
        steps: optimizer steps of the stage, of which ``done`` are taken.
    """

    rollouts: list[Rollout]
    columns: dict[str, Tensor]
    sequence_N: Tensor
    teacher_cache: TeacherCache | None = None
    teacher_requests: dict[str, TeacherRequests] = field(default_factory=dict)
    model: Model | None = None
    steps: int = 1

    @property
    def done(self) -> int:
        return self.rollouts[0].version

    def mean(self, value_N: Tensor) -> Tensor:
        """Return the mean over the tokens of each rollout. Shape [B]."""
        sums_B = per_sequence(value_N, self.sequence_N, len(self.rollouts))
        return sums_B / torch.tensor([r.length for r in self.rollouts], device=sums_B.device)

    def largest(self, value_N: Tensor, share: float) -> Tensor:
        """Return True for the largest ``share`` of tokens, one at least; of equals the first.
        [N]."""
        count = max(1, round(share * len(value_N)))
        kept_N = torch.zeros(len(value_N), dtype=torch.bool, device=value_N.device)
        kept_N[value_N.argsort(descending=True, stable=True)[:count]] = True
        return kept_N

    def future(self, value_N: Tensor, discount: float) -> Tensor:
        """Return the discounted sum of what comes after each token in its rollout. Shape [N]."""
        return discounted_future_sum(value_N, self.sequence_N, len(self.rollouts), discount)

    def so_far(self, value_N: Tensor) -> Tensor:
        """Return the sum of each token's value and of those before it in its rollout. Shape [N]."""
        return cumulative_sum(value_N, self.sequence_N, len(self.rollouts))

    def places(self) -> tuple[Tensor, Tensor]:
        """Return each token's place in its rollout, from 0, and that rollout's length. [N] each."""
        return token_positions(self.sequence_N, len(self.rollouts))

    def spread(self, value_B: list[float]) -> Tensor:
        """Return one number per token from one per rollout. Shape [N]."""
        like = torch.tensor(value_B, dtype=torch.get_default_dtype())
        return like.to(self.sequence_N.device)[self.sequence_N]
