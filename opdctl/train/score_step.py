"""Everything a step knows of its rollouts before the update: flat per-token columns.

The policy's own scores, the teachers' scores checked on arrival, rewards: one number per response
token each, in the order of the rollouts. What a teacher column has two axes for, [N, M], is one
entry for each of the M teachers of a token (M > 1 where teachers are pooled).
"""

from __future__ import annotations

from typing import Any

import torch

from opdctl.kernels.chunks import rows_in
from opdctl.kernels.select import rows_class
from opdctl.loss.token_view import LossTerm, PerStep
from opdctl.models.model import Model
from opdctl.models.packing import per_sequence
from opdctl.scoring.ask_teachers import score_by_reference, score_by_teachers
from opdctl.scoring.score import Scores, score
from opdctl.scoring.teacher_cache import reverse_kl
from opdctl.train.context import Context
from opdctl.train.metrics import by_domain
from opdctl.train.step import Step, TrainSetup
from opdctl.types import FORWARD, Compute, Rollout


def score_step(
    rollouts: list[Rollout], model: Model, parts: TrainSetup, ctx: Context, compute: Compute
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
        step.columns["behaviour"] = torch.tensor(flat, device=device, dtype=model.logits_dtype)
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
        score_by_teachers(step, requests, parts, ctx, compute, ours_NK)
    if parts.reference_wants:
        score_by_reference(step, requests, parts, ctx, compute)
    if "kl" in parts.policy_wants:
        head = model.lm_head(parts.temperature, runtime.rounded_logits)
        step.columns["policy_kl"] = reverse_kl(
            policy.hidden_ND,
            head,
            step.teacher_cache,
            step.columns,
            rows_of=rows_class(runtime.kernel, device, head.logits_dtype),
            size=rows_in(runtime.chunk_mib, head),
            top=parts.policy_top,
        )
    return step


def set_advantage(step: Step, signals: dict[str, tuple[float, Any]]) -> dict:
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


def set_weights(step: Step, terms: list[LossTerm]) -> dict[str, float]:
    """Sets the columns of weights that see the step. Returns their means, and what they log."""
    values = {}
    for part in [p for t in terms for p in (*t.masks, *t.factors) if isinstance(p, PerStep)]:
        step.columns[part.column] = part.of(step).to(step.model.logits_dtype)
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
