"""The gradients of several objectives on the same rollouts: their means and their variances.

Of n batches with gradients g_i: trace variance = sum |g_i - mean|^2 / (n - 1), and the cosine
between the means. Nothing is trained. Their sum is one more objective, where asked for.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import asdict, dataclass

import torch

from opdctl.errors import Interrupted, StageFailed
from opdctl.models.model import Model
from opdctl.models.packing import pack
from opdctl.run.rundir import write_json
from opdctl.scoring.asks import Asks, Pass
from opdctl.scoring.quantities import HIDDEN
from opdctl.train import checkpoint, update
from opdctl.train.context import Clock, Context
from opdctl.train.loop import count_rollouts
from opdctl.train.metrics import Metrics
from opdctl.train.score_step import score_step, set_advantage, set_weights
from opdctl.train.step import Step, TrainSetup
from opdctl.types import Compute

SUM = "their sum"


@dataclass
class Sums:
    """The sums over the batches done: gradients (flat, float64), their squared norms, the ledger.

    Attributes:
        gap: of rebuilt logits, of the first batch.
    """

    done: int
    sums: dict[str, torch.Tensor]
    squares: dict[str, float]
    compute: Compute
    gap: float = 0.0


def measure(ctx: Context, model: Model, setup: TrainSetup) -> Compute:
    """Write ``facts.json``: variances, cosines, and how exact rebuilt logits are.

    Raises:
        Interrupted: a stop was asked for; a checkpoint of the sums is committed.
    """
    so_far, metrics = _restored(ctx, model), Metrics(ctx.folder, ctx.attempt)
    try:
        while so_far.done < ctx.config.batches:
            ctx.check()
            _batch(ctx, model, setup, so_far, metrics)
            if so_far.done % ctx.runtime.checkpoint_every == 0:
                _save(ctx, so_far)
    except Interrupted:
        if so_far.done:
            _save(ctx, so_far)
        raise
    finally:
        metrics.close()
    facts = summary(so_far.sums, so_far.squares, so_far.done)
    if HIDDEN in setup.teacher_asks:
        facts["gap of rebuilt logits"] = so_far.gap
    write_json(ctx.folder / "facts.json", facts)
    return so_far.compute


def _batch(ctx: Context, model: Model, setup: TrainSetup, so_far: Sums, metrics: Metrics) -> None:
    """Take one more batch; ``so_far`` changes when all of its gradients are there.

    Raises:
        StageFailed: the source refused all of its samples.
    """
    clock, compute, gap = Clock(), copy.deepcopy(so_far.compute), so_far.gap
    rollouts = [r for r in setup.source.draw(so_far.done) if r.response_ids]
    if not rollouts:
        raise StageFailed(
            f"batch {so_far.done + 1} has nothing to measure",
            "the source refused all of its samples: raise prompts.per_step",
        )
    if not so_far.done:
        ctx.show_first(rollouts[0], model.tokenizer)
    count_rollouts(setup.source, compute)
    clock.lap("rollout")
    step = score_step(rollouts, model, setup, ctx, compute)
    set_advantage(step, setup.signals)
    set_weights(step, setup.terms)
    if not so_far.done and HIDDEN in setup.teacher_asks:
        gap = rebuilt(ctx, step, setup, compute)
    clock.lap("score")
    gradients, names = {}, [n for n in so_far.sums if n != SUM]
    for name, term in zip(names, setup.terms, strict=True):
        gradients[name], processed = _gradient(ctx, model, setup, step, term)
        compute.train_tokens += processed
        compute.flops["train"] += model.flops * processed
    if SUM in so_far.sums:
        gradients[SUM] = sum(gradients.values())  # each has its coef
    norms = {name: float(g_P.norm()) for name, g_P in gradients.items()}
    clock.lap("train")
    for name, g_P in gradients.items():
        so_far.sums[name] += g_P
        so_far.squares[name] += norms[name] ** 2
    so_far.done, so_far.gap, so_far.compute = so_far.done + 1, gap, compute
    metrics.row(so_far.done, {"grad_norm": norms}, clock.seconds)
    for phase, spent in clock.seconds.items():
        compute.seconds[phase] += spent
    ctx.loop_seconds += clock.last - clock.start


def _restored(ctx: Context, model: Model) -> Sums:
    """Return the sums of the newest checkpoint, or of nothing."""
    names = [n for n, o in ctx.config.objectives.items() if o.coef]
    names += [SUM] if ctx.config.together else []
    sizes = dict.fromkeys(names, model.trained)

    def check(sums: dict) -> None:
        if {n: s.numel() for n, s in sums.items()} != sizes:
            raise ValueError("its sums are of another model, or of other objectives")

    saved = checkpoint.read(ctx.folder / "checkpoints", ("sums",), check)
    if saved is None:
        zeros = {
            n: torch.zeros(size, dtype=torch.float64, device=model.device)
            for n, size in sizes.items()
        }
        return Sums(0, zeros, dict.fromkeys(names, 0.0), Compute())
    (sums,), state = saved
    # memory of a file begins anywhere, and where a vector begins decides how its products round
    sums = {n: sums[n].to(model.device, copy=True) for n in names}
    return Sums(state["step"], sums, state["squares"], Compute(**state["compute"]), state["gap"])


def _save(ctx: Context, so_far: Sums) -> None:
    state = {"squares": so_far.squares, "gap": so_far.gap, "compute": asdict(so_far.compute)}
    folder, keep = ctx.folder / "checkpoints", ctx.runtime.keep_checkpoints
    checkpoint.write(folder, so_far.done, {"sums": so_far.sums}, state, keep)
    ctx.wal.drop(so_far.done)


def _gradient(ctx, model, setup, step, term) -> tuple[torch.Tensor, int]:
    """The gradient of one objective, flat, in float64."""
    model.net.zero_grad(set_to_none=True)
    spans = [r.request for r in step.rollouts]
    batch = setup.batch(spans, step.columns, step.teacher_cache, [term])
    result = update.accumulate(model, batch, Pass.of(ctx, setup.temperature))
    flat = [  # an expert that no token went to has none
        (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
        for p in model.net.parameters()
        if p.requires_grad
    ]
    model.net.zero_grad(set_to_none=True)
    return torch.cat(flat).double(), result.processed


def summary(sums: dict, squares: dict[str, float], n: int) -> dict[str, float]:
    """Return facts by name, from sums of gradients and of their squared norms over n batches."""
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
def rebuilt(ctx: Context, step: Step, setup: TrainSetup, compute: Compute) -> float:
    """Return the largest gap of a teacher's own logits and those of its cached hidden rows.

    Over the first few rollouts of each teacher; the logits at temperature 1, as the head gives
    them, in the widest type of the two.
    """
    gap = 0.0
    for name, mine in step.teacher_requests.items():
        (teacher, _), requests = setup.teachers[name], mine.requests[:16]
        cached = teacher.score(requests, Asks.of(HIDDEN), Pass.of(ctx, 1.0))
        logits_NV = teacher.model.lm_head().logits(cached.hidden_ND)
        packed = pack(requests, teacher.model.pad, teacher.model.device)
        direct = teacher.model.own_logits(packed.ids_BT).flatten(0, 1)
        direct_NV = direct[packed.prediction_N, : logits_NV.shape[1]].to(logits_NV.dtype)
        gap = max(gap, float((logits_NV - direct_NV).abs().max()))
        compute.teacher_tokens += 2 * packed.positions
        compute.flops["teacher"] += 4.0 * teacher.parameters * packed.positions
        ctx.check()
    return gap
