"""The gradients of several objectives on the same rollouts: their means and their variances.

Of n batches with gradients g_i: trace variance = sum |g_i - mean|^2 / (n - 1), and the cosine
between the means. Nothing is trained.
"""

from __future__ import annotations

import itertools
import math

import torch

from opdctl.core import update
from opdctl.core.context import Clock, Context
from opdctl.core.metrics import Metrics
from opdctl.core.models import Model
from opdctl.core.scored import Parts, Step, advantage, scored, weigh
from opdctl.core.tokens import pack
from opdctl.rundir import write_json
from opdctl.types import FORWARD, Compute


def measure(ctx: Context, model: Model, parts: Parts) -> Compute:
    """Write ``facts.json``: variances, cosines, and how exact rebuilt logits are.

    Raises:
        Interrupted: a stop was asked for; a later attempt starts again.
    """
    names = [n for n, o in ctx.config.objectives.items() if o.coef]
    terms = dict(zip(names, parts.terms, strict=True))
    sums = dict.fromkeys(names, 0.0)
    squares = dict.fromkeys(names, 0.0)
    metrics, compute, gap = Metrics(ctx.folder, ctx.attempt), Compute(), 0.0
    for batch in range(ctx.config.batches):
        ctx.check()
        clock = Clock()
        rollouts = parts.source.draw(batch)
        if not batch:
            ctx.show_first(rollouts[0], model.tokenizer)
        compute.rollout_tokens += parts.source.sampled
        compute.flops["rollout"] += FORWARD * model.parameters * parts.source.sampled
        clock.lap("rollout")
        step = scored(rollouts, model, parts, ctx, compute)
        advantage(step, parts.signals)
        weigh(step, parts.terms)
        if not batch and "hidden" in parts.teacher_wants:
            gap = rebuilt(ctx, step, parts, compute)
        clock.lap("score")
        norms = {}
        for name, term in terms.items():
            g_P, processed = _gradient(ctx, model, parts, step, term)
            compute.train_tokens += processed
            compute.flops["train"] += model.flops * processed
            sums[name] = sums[name] + g_P
            norms[name] = float(g_P.norm())
            squares[name] += norms[name] ** 2
        clock.lap("train")
        metrics.row(batch + 1, {"grad_norm": norms}, clock.seconds)
        for phase, spent in clock.seconds.items():
            compute.seconds[phase] += spent
        ctx.loop_seconds += clock.last - clock.start
    metrics.close()
    facts = summary(sums, squares, ctx.config.batches)
    if "hidden" in parts.teacher_wants:
        facts["gap of rebuilt logits"] = gap
    write_json(ctx.folder / "facts.json", facts)
    return compute


def _gradient(ctx, model, parts, step, term) -> tuple[torch.Tensor, int]:
    """The gradient of one objective, flat, in float64."""
    runtime = ctx.runtime
    model.net.zero_grad(set_to_none=True)
    _, _, processed = update.accumulate(
        model,
        [r.request for r in step.rollouts],
        step.columns,
        [term],
        temperature=parts.temperature,
        micro_batch=runtime.micro_batch,
        chunk_mib=runtime.chunk_mib,
        kernel=runtime.kernel,
        rounded=runtime.rounded_logits,
        taught=step.taught,
    )
    flat = [p.grad.flatten() for p in model.net.parameters() if p.grad is not None]
    model.net.zero_grad(set_to_none=True)
    return torch.cat(flat).double(), processed


def summary(sums: dict, squares: dict[str, float], n: int) -> dict[str, float]:
    """Facts by name, from sums of gradients and of their squared norms over n batches."""
    facts = {}
    for name, sum_P in sums.items():
        spread = squares[name] - float(sum_P @ sum_P) / n
        facts[f"variance of {name}"] = spread / (n - 1)
        facts[f"norm of {name}"] = float(sum_P.norm()) / n
    for a, b in itertools.combinations(sums, 2):
        norms = math.sqrt(float(sums[a] @ sums[a]) * float(sums[b] @ sums[b]))
        facts[f"cosine of {a} and {b}"] = float(sums[a] @ sums[b]) / norms if norms else 0.0
    return facts


@torch.no_grad()
def rebuilt(ctx: Context, step: Step, parts: Parts, compute: Compute) -> float:
    """Largest difference between a teacher's own logits and those of its cached hidden rows.

    Over the first few rollouts of each teacher; the logits at temperature 1, as the head gives
    them, in the widest type of the two.
    """
    gap = 0.0
    for name, (teacher, _) in parts.teachers.items():
        own = [r.request for r in step.rollouts if name in parts.route[r.prompt.domain]][:16]
        if not own:
            continue
        cached = teacher.score(own, 1.0, ("hidden",))
        logits_NV = teacher.model.projection().logits(cached.hidden_ND)
        packed = pack(own, teacher.model.pad, teacher.model.device)
        direct = teacher.model.own_logits(packed.ids_BT).flatten(0, 1)
        direct_NV = direct[packed.prediction_N, : logits_NV.shape[1]].to(logits_NV.dtype)
        gap = max(gap, float((logits_NV - direct_NV).abs().max()))
        compute.teacher_tokens += 2 * packed.positions
        compute.flops["teacher"] += 4.0 * teacher.parameters * packed.positions
        ctx.check()
    return gap
