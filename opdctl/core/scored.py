"""Everything a step knows of its rollouts before the update: flat per-token columns.

The policy's own scores, the teachers' scores checked on arrival, rewards: one number per response
token each, in the order of the rollouts. What a teacher column has two axes for, [N, M], is one
entry for each of the M teachers of a token (M > 1 where teachers are pooled).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opdctl.core.chunks import rows_in
from opdctl.core.context import Context
from opdctl.core.metrics import by_domain
from opdctl.core.models import Model
from opdctl.core.scoring import Scores, score
from opdctl.core.taught import Taught, reverse_kl
from opdctl.core.teaching import refer, teach
from opdctl.core.tokens import future, per_sequence, places, so_far
from opdctl.core.view import PerStep, Term
from opdctl.kernels.select import rows_class
from opdctl.nets.layers import Layers
from opdctl.types import FORWARD, Compute, Rollout


@dataclass
class Parts:
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
    terms: list[Term]
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

    ``taught`` holds a head and hidden rows of each teacher asked; the columns ``teacher_index`` and
    ``teacher_row``, [N, M], say which rows of which teachers belong to a token. ``model`` is the
    policy, for its tokenizer and vocabulary; ``done`` of ``steps`` optimizer steps are taken.
    """

    rollouts: list[Rollout]
    columns: dict[str, Tensor]
    sequence_N: Tensor
    taught: Taught | None = None
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
        return future(value_N, self.sequence_N, len(self.rollouts), discount)

    def so_far(self, value_N: Tensor) -> Tensor:
        """The sum of each token's value and of those before it in its rollout. Shape [N]."""
        return so_far(value_N, self.sequence_N, len(self.rollouts))

    def places(self) -> tuple[Tensor, Tensor]:
        """Each token's place in its rollout, from 0, and that rollout's length. [N] each."""
        return places(self.sequence_N, len(self.rollouts))

    def spread(self, value_B: list[float]) -> Tensor:
        """One number per rollout -> one per token. Shape [N]."""
        like = torch.tensor(value_B, dtype=torch.get_default_dtype())
        return like.to(self.sequence_N.device)[self.sequence_N]


def scored(
    rollouts: list[Rollout], model: Model, parts: Parts, ctx: Context, compute: Compute
) -> Step:
    """Score the rollouts: rewards, the policy, their teachers; count what it cost.

    Raises:
        StageFailed: a teacher answered short or with something that is not finite; names the
            rollout.
    """
    for reward in parts.rewards:
        reward.score(rollouts)
        read = sum(len(r.prompt_ids) + len(r.response_ids) for r in rollouts)
        compute.flops["teacher"] += FORWARD * reward.parameters * read
    device, runtime = model.device, ctx.runtime
    lengths = torch.tensor([r.length for r in rollouts])
    sequence_N = torch.repeat_interleave(torch.arange(len(rollouts)), lengths).to(device)
    step = Step(rollouts, {}, sequence_N, model=model, steps=parts.steps)
    if all(r.behaviour_logprobs is not None for r in rollouts):
        flat = [v for r in rollouts for v in r.behaviour_logprobs]
        step.columns["behaviour"] = torch.tensor(flat, device=device, dtype=model.wide)
    if all(r.reward is not None for r in rollouts):
        step.columns["reward"] = step.spread([r.reward for r in rollouts])
    if parts.judged:
        step.columns["right"] = step.spread(ctx.verify(rollouts))
    domains = sorted({r.prompt.domain for r in rollouts})
    step.columns["domain"] = step.spread([domains.index(r.prompt.domain) for r in rollouts]).long()
    requests = [r.request for r in rollouts]
    policy = _policy(step, requests, model, parts, ctx, compute) if parts.policy_wants else None
    if parts.teachers:
        ours_NK = policy.top_NK if policy is not None else None
        teach(step, requests, parts, ctx, compute, ours_NK)
    if parts.reference_wants:
        refer(step, requests, parts, ctx, compute)
    if "kl" in parts.policy_wants:
        head = model.projection(parts.temperature, runtime.rounded_logits)
        step.columns["policy_kl"] = reverse_kl(
            policy.hidden_ND,
            head,
            step.taught,
            step.columns,
            rows_of=rows_class(runtime.kernel, device, head.wide),
            size=rows_in(runtime.chunk_mib, head),
            top=parts.policy_top,
        )
    return step


def advantage(step: Step, signals: dict[str, tuple[float, Any]]) -> dict:
    """Sets the column ``advantage``: the sum of coef x signal. Returns what to log of it.

    Each signal's mean, spread and share of the whole; with a teacher the divergence by domain.
    """
    values: dict[str, Any] = {}
    credit = {n: (c, s.credit(step)) for n, (c, s) in signals.items()}
    if not credit:
        return values
    step.columns["advantage"] = sum(c * v for c, v in credit.values())
    size = {n: float((c * v).abs().mean()) for n, (c, v) in credit.items()}
    whole = sum(size.values())
    for name, (_, vector_N) in credit.items():
        values[f"{name}_mean"] = float(vector_N.mean())
        values[f"{name}_std"] = float(vector_N.std(correction=0))
        values[f"{name}_share"] = size[name] / whole if whole else 0.0
        for what, value in getattr(signals[name][1], "logged", {}).items():
            values[f"{name}_{what}"] = value
    if {"teacher", "policy"} <= step.columns.keys():
        gap_N = step.columns["policy"] - step.columns["teacher"]
        sums_B = per_sequence(gap_N, step.sequence_N, len(step.rollouts)).tolist()
        each = [s / r.length for r, s in zip(step.rollouts, sums_B, strict=True)]
        values["kl"] = by_domain(step.rollouts, each)
    return values


def weigh(step: Step, terms: list[Term]) -> dict[str, float]:
    """Sets the columns of weights that see the step. Returns their means, and what they log."""
    values = {}
    for part in [p for t in terms for p in (*t.masks, *t.factors) if isinstance(p, PerStep)]:
        step.columns[part.column] = part.of(step).to(step.model.wide)
        values |= {part.column: float(step.columns[part.column].mean()), **part.logged}
    return values


def _policy(step, requests, model, parts, ctx, compute) -> Scores:
    """The student's own scores of its rollouts, before the update."""
    wants = {"kl": "hidden", "logprobs": "logprobs", "entropy": "entropy", "overlap": "topk"}
    found = score(
        model,
        requests,
        temperature=parts.temperature,
        want=[wants[w] for w in parts.policy_wants],
        top=parts.overlap_top,
        rounded=ctx.runtime.rounded_logits,
        micro_batch=ctx.runtime.micro_batch,
        chunk_mib=ctx.runtime.chunk_mib,
        check=ctx.check,
    )
    if found.logprobs_N is not None:
        step.columns["policy"] = found.logprobs_N
    if found.entropy_N is not None:
        step.columns["policy_entropy"] = found.entropy_N
    compute.flops["train"] += FORWARD * model.parameters * sum(len(q.ids) for q in requests)
    return found
