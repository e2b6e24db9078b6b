"""What a stage puts into the loop, and what one step of it knows of its rollouts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opdctl.loss.token_view import LossTerm
from opdctl.models.hidden_layers import Layers
from opdctl.models.model import Model
from opdctl.models.packing import (
    cumulative_sum,
    discounted_future_sum,
    per_sequence,
    token_positions,
)
from opdctl.scoring.teacher_cache import TeacherCache
from opdctl.types import Rollout


@dataclass
class TrainSetup:
    """What a stage puts into the loop.

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
        reference_wants: what is asked of it: logprobs, and modal, its log-prob of the teacher's
            most probable token (the column ``reference_modal``).
        teacher_wants: what is asked of them: logprobs, hidden, inner, lse, topk, entropy, modal,
            the log-prob of the most probable token (the column ``teacher_modal``), above, the
            mass of the tokens more probable than the sampled one (``teacher_above``), listed, the
            top k with their log-probs, and listed_entropy (a column ``teacher_`` of that name).
        layers: whose hidden states are compared; None where none are.
        rebuilds: logits of teachers are rebuilt from hidden, so their heads are needed too.
        teacher_top: k of topk.
        policy_wants: what a no-grad pass of the student before the update is for: logprobs,
            entropy, kl, its divergence to the teacher (the column ``policy_kl``), and overlap, the
            share of its top k that is the teacher's too (the column ``drift_overlap``).
        policy_top: k of that kl; 0 is the whole vocabulary.
        overlap_top: k of that overlap.
        judged: a member wants each response's verdict (the column ``right``).
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
    reference_wants: tuple[str, ...] = ()
    teacher_wants: tuple[str, ...] = ("logprobs",)
    layers: Layers | None = None
    rebuilds: bool = True
    teacher_top: int = 16
    policy_wants: tuple[str, ...] = ()
    policy_top: int = 0
    overlap_top: int = 16
    judged: bool = False
    temperature: float = 1.0
    sampled_at: float = 1.0
    steps: int = 1
    updates: int = 1
    minibatches: int = 1


@dataclass
class Step:
    """All rollouts of one step and their per-token columns, flat and in their order.

    ``teacher_cache`` holds a head and hidden rows of each teacher asked; the columns
    ``teacher_index`` and ``teacher_row``, [N, M], say which rows of which teachers belong to a
    token. ``model`` is the policy, for its tokenizer and vocabulary; ``done`` of ``steps``
    optimizer steps are taken.
    """

    rollouts: list[Rollout]
    columns: dict[str, Tensor]
    sequence_N: Tensor
    teacher_cache: TeacherCache | None = None
    model: Model | None = None
    steps: int = 1

    @property
    def done(self) -> int:
        return self.rollouts[0].version

    def mean(self, value_N: Tensor) -> Tensor:
        """Mean over the tokens of each rollout. Shape [B]."""
        sums_B = per_sequence(value_N, self.sequence_N, len(self.rollouts))
        return sums_B / torch.tensor([r.length for r in self.rollouts], device=sums_B.device)

    def largest(self, value_N: Tensor, share: float) -> Tensor:
        """True for the largest ``share`` of all tokens, one at least; of equals the first. [N]."""
        count = max(1, round(share * len(value_N)))
        kept_N = torch.zeros(len(value_N), dtype=torch.bool, device=value_N.device)
        kept_N[value_N.argsort(descending=True, stable=True)[:count]] = True
        return kept_N

    def future(self, value_N: Tensor, discount: float) -> Tensor:
        """The discounted sum of what comes after each token in its rollout. Shape [N]."""
        return discounted_future_sum(value_N, self.sequence_N, len(self.rollouts), discount)

    def so_far(self, value_N: Tensor) -> Tensor:
        """The sum of each token's value and of those before it in its rollout. Shape [N]."""
        return cumulative_sum(value_N, self.sequence_N, len(self.rollouts))

    def places(self) -> tuple[Tensor, Tensor]:
        """Each token's place in its rollout, from 0, and that rollout's length. [N] each."""
        return token_positions(self.sequence_N, len(self.rollouts))

    def spread(self, value_B: list[float]) -> Tensor:
        """One number per rollout -> one per token. Shape [N]."""
        like = torch.tensor(value_B, dtype=torch.get_default_dtype())
        return like.to(self.sequence_N.device)[self.sequence_N]
