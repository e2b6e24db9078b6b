"""All that is known of a step's rollouts before the update, as flat per-token columns.

The policy's own scores, the teachers' scores checked on arrival, rewards: one number per response
token each, in the order of the rollouts. A teacher column of shape [N, M] has one entry per teacher
of a token (M > 1 where teachers are pooled).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opdctl.kernels.chunks import rows_in
from opdctl.kernels.select import rows_class
from opdctl.loss.token_view import LossTerm, PerStep
from opdctl.models.model import Model
from opdctl.models.packing import per_sequence
from opdctl.protocols import Live
from opdctl.scoring.ask_teachers import (
    TeacherRequests,
    TeacherScores,
    require_same_targets,
    score_by_reference,
    score_by_teachers,
)
from opdctl.scoring.asks import Pass
from opdctl.scoring.columns import (
    ADVANTAGE,
    BEHAVIOUR,
    DOMAIN,
    FIXED_ADVANTAGE,
    POLICY,
    POLICY_KL,
    REWARD,
    RIGHT,
    TEACHER,
    TEACHER_TOP1_ID,
    column_of,
)
from opdctl.scoring.score import Scores, score
from opdctl.scoring.teacher_cache import reverse_kl
from opdctl.train.context import Context
from opdctl.train.metrics import by_domain
from opdctl.train.step import Step, TrainSetup
from opdctl.types import FORWARD, Compute, Rollout, ScoreRequest


def score_step(
    rollouts: list[Rollout], model: Model, setup: TrainSetup, ctx: Context, compute: Compute
) -> Step:
    """Score the rollouts: rewards, the policy, their teachers; count what it cost.

    Raises:
        StageFailed: a teacher answered short or with something that is not finite; names the
            rollout.
    """
    for reward in setup.rewards:
        reward.score(rollouts)
        read = sum(len(r.prompt_ids) + len(r.response_ids) for r in rollouts)
        compute.flops["teacher"] += FORWARD * reward.parameters * read
    step = _unscored(rollouts, model, setup, ctx)
    run, requests = Pass.of(ctx, setup.temperature), [r.request for r in rollouts]
    policy = None
    if setup.policy_asks:
        policy = score(model, requests, setup.policy_asks, run)
        step.columns |= {column_of("policy", n): v for n, v in policy.per_token.items()}
        read = sum(len(q.ids) for q in requests)
        compute.flops["train"] += FORWARD * model.parameters * read
    like = torch.empty(0, dtype=model.logits_dtype, device=model.device)
    if setup.teachers:
        step.teacher_requests = requests_by_teacher(rollouts, requests, setup)
        require_same_targets(step.teacher_requests, requests)
        answer = score_by_teachers(
            step.teacher_requests,
            setup.teachers,
            setup.teacher_asks,
            run,
            ctx.wal,
            like=like,
            ours_NK=policy.top_NK if policy is not None else None,
        )
        step.columns |= answer.columns
        step.teacher_cache = answer.cache
        _count(compute, answer)
        for rollout in rollouts:
            rollout.teacher = "+".join(setup.route[rollout.prompt.domain])
    if setup.reference_asks:
        top1 = step.columns[TEACHER_TOP1_ID] if "top1" in setup.reference_asks else None
        answer = score_by_reference(
            requests,
            [r.name for r in rollouts],
            setup.reference,
            run,
            ctx.wal,
            like=like,
            top1_id_N=top1,
        )
        step.columns |= answer.columns
        _count(compute, answer)
    if setup.policy_kl_top is not None:
        assert policy is not None, "what reads the divergence asks for the policy's rows"
        step.columns[POLICY_KL] = _policy_kl(step, model, policy, run, setup.policy_kl_top)
    return step


def requests_by_teacher(
    rollouts: list[Rollout], requests: list[ScoreRequest], setup: TrainSetup
) -> dict[str, TeacherRequests]:
    """Return what each teacher is asked: of the rollouts of its domains, what the student saw.

    Args:
        requests: the student's own, of the rollouts in their order.
    """
    by_teacher: dict[str, TeacherRequests] = {}
    routes = [setup.route[rollout.prompt.domain] for rollout in rollouts]
    for name in setup.teachers:
        mine = [i for i, names in enumerate(routes) if name in names]
        if mine:
            by_teacher[name] = TeacherRequests(
                rollouts=mine,
                requests=[requests[i] for i in mine],
                places=[routes[i].index(name) for i in mine],
                names=[rollouts[i].name for i in mine],
            )
    return by_teacher


def _unscored(rollouts: list[Rollout], model: Model, setup: TrainSetup, ctx: Context) -> Step:
    """Return the step with the columns that need no model: behaviour, reward, verdict, domain."""
    device = model.device
    lengths = torch.tensor([r.length for r in rollouts])
    sequence_N = torch.repeat_interleave(torch.arange(len(rollouts)), lengths).to(device)
    step = Step(rollouts, {}, sequence_N, model=model, steps=setup.steps)
    behaviour = [r.behaviour_logprobs for r in rollouts if r.behaviour_logprobs is not None]
    if len(behaviour) == len(rollouts):
        flat = [v for logprobs in behaviour for v in logprobs]
        step.columns[BEHAVIOUR] = torch.tensor(flat, device=device, dtype=model.logits_dtype)
    rewards = [r.reward for r in rollouts if r.reward is not None]
    if len(rewards) == len(rollouts):
        step.columns[REWARD] = step.spread(rewards)
    if setup.judged:
        step.columns[RIGHT] = step.spread(ctx.verdicts.verify(rollouts))
    domains = sorted({r.prompt.domain for r in rollouts})
    step.columns[DOMAIN] = step.spread([domains.index(r.prompt.domain) for r in rollouts]).long()
    return step


def _count(compute: Compute, answer: TeacherScores) -> None:
    compute.teacher_tokens += answer.tokens
    compute.flops["teacher"] += answer.flops


def _policy_kl(step: Step, model: Model, policy: Scores, run: Pass, top: int) -> Tensor:
    """Return the policy's divergence to each token's teachers, on its ``top`` or all ids. [N]."""
    head = model.lm_head(run.temperature, run.rounded)
    assert policy.hidden_ND is not None and step.teacher_cache is not None, "both were asked for"
    return reverse_kl(
        policy.hidden_ND,
        head,
        step.teacher_cache,
        step.columns,
        rows_of=rows_class(run.kernel, step.sequence_N.device, head.logits_dtype),
        size=rows_in(run.chunk_mib, head),
        top=top,
    )


def set_advantage(step: Step, signals: dict[str, tuple[float, Any]]) -> dict:
    """Set the column ``advantage``, the sum of coef x signal; return what to log of it.

    Each signal's mean, spread and share of the whole, and what a baseline does to the variance;
    with a teacher the divergence by domain.
    """
    values: dict[str, Any] = {}
    credit = {n: (c, s.credit(step)) for n, (c, s) in signals.items()}
    if not credit:
        return values
    zero_N = torch.zeros_like(next(iter(credit.values()))[1])
    step.columns[ADVANTAGE] = sum((c * v for c, v in credit.values()), zero_N)
    live = {n for n, (_, s) in signals.items() if isinstance(s, Live) and s.live}
    if live:
        rest = (c * v for n, (c, v) in credit.items() if n not in live)
        step.columns[FIXED_ADVANTAGE] = sum(rest, zero_N)
    size = {n: float((c * v).abs().mean()) for n, (c, v) in credit.items()}
    whole = sum(size.values())
    for name, (_, vector_N) in credit.items():
        values[f"{name}_mean"] = float(vector_N.mean())
        values[f"{name}_std"] = float(vector_N.std(correction=0))
        values[f"{name}_share"] = size[name] / whole if whole else 0.0
        for key, value in signals[name][1].logged.items():
            values[f"{name}_{key}"] = value
        if signals[name][1].is_baseline and POLICY in step.columns:
            plain_N = sum((c * v for n, (c, v) in credit.items() if n != name), zero_N)
            values |= _variance(name, step, plain_N)
    if {TEACHER, POLICY} <= step.columns.keys():
        gap_N = step.columns[POLICY] - step.columns[TEACHER]
        sums_B = per_sequence(gap_N, step.sequence_N, len(step.rollouts)).tolist()
        each = [s / r.length for r, s in zip(step.rollouts, sums_B, strict=True)]
        values["kl"] = by_domain(step.rollouts, each)
    return values


def _variance(name: str, step: Step, plain_N: Tensor) -> dict[str, float]:
    """Return what a baseline makes of the variance of the sampled gradient, as a factor.

    The mean gradient is the same with it and without, so the mean squares tell. Of a token's
    gradient the part on its own logit is counted, advantage x (1 - p).

    Args:
        plain_N: the advantage without it.
    """
    push_N = 1 - step.columns[POLICY].exp()
    before, after = (
        float((push_N * a_N).square().sum()) for a_N in (plain_N, step.columns[ADVANTAGE])
    )
    return {f"{name}_variance": after / before} if before else {}


def set_weights(step: Step, terms: list[LossTerm]) -> dict[str, float]:
    """Set the columns of weights that see the step; return their means, and what they log."""
    values, model = {}, step.model
    assert model is not None, "a step that was scored has the policy"
    for part in [p for t in terms for p in (*t.masks, *t.factors) if isinstance(p, PerStep)]:
        step.columns[part.column] = part.of(step).to(model.logits_dtype)
        values |= {part.column: float(step.columns[part.column].mean()), **part.logged}
    return values
