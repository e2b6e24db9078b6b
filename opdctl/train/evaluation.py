"""Sample held-out prompts, verify, summarise. One record per domain, kept as it is finished."""

from __future__ import annotations

import math

import numpy as np

from opdctl.errors import UsageError
from opdctl.intervals import share_ends
from opdctl.rollout.prompts import prompts_within_limit
from opdctl.rollout.sampling import sample_group
from opdctl.run.rundir import read_json, write_json
from opdctl.train.context import Clock, Context
from opdctl.train.metrics import Metrics, mean
from opdctl.types import FORWARD, Compute


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return 1 - C(n - right, k) / C(n, k): unbiased for the chance that one of k samples is
    right."""
    if n - right < k:
        return 1.0
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def half_width(values: list[float]) -> float:
    """Return 1.96 standard errors of the mean of independent values; 0 for fewer than two."""
    n = len(values)
    if n < 2:
        return 0.0
    centre = mean(values)
    variance = sum((v - centre) ** 2 for v in values) / (n - 1)
    return 1.96 * math.sqrt(variance / n)


def record(
    model: str,
    domain: str,
    samples: int,
    right: list[int],
    lengths: list[int],
    obeyed: list[int],
) -> dict:
    """Return one line of results.json.

    Args:
        right: correct samples of each prompt.
        lengths: tokens of each sample, a prompt's next to each other.
        obeyed: samples of each prompt that think if and only if its mode says so.
    """
    shares = [r / samples for r in right]
    low, high = share_ends([np.array(shares)])
    ks = [k for k in (2**i for i in range(11)) if k <= samples]
    return {
        "model": model,
        "domain": domain,
        "n": len(right) * samples,
        "accuracy": mean(shares),
        "ci95": [float(low), float(high)],
        "pass_at_k": {str(k): mean(pass_at_k(samples, r, k) for r in right) for k in ks},
        "mean_tokens": mean(lengths),
        "prompts": len(right),
        "samples": samples,
        "right": right,
        "obeyed": obeyed,
        "obedience": mean(obeyed) / samples,
        "tokens": [sum(lengths[i : i + samples]) for i in range(0, len(lengths), samples)],
    }


def evaluate(ctx: Context) -> Compute:
    """Write ``results.json``: one record per domain.

    Raises:
        Interrupted: a stop was asked for; finished domains are kept.
    """
    config, compute = ctx.config, Compute()
    model = ctx.models.frozen(config.student)
    metrics = Metrics(ctx.folder, ctx.attempt)
    records = []
    name = config.student.removeprefix("stage:")
    for done, domain in enumerate(ctx.recipe.domains(ctx.name), 1):
        clock = Clock()
        kept = ctx.folder / "parts" / f"{domain}.json"
        summary = read_json(kept)
        if not summary:
            summary = _domain(ctx, model, name, domain)
            write_json(kept, summary)
        compute.rollout_tokens += summary["processed"]
        compute.flops["rollout"] += FORWARD * model.parameters * summary.pop("processed")
        records.append(summary)
        clock.lap("rollout")
        compute.seconds["rollout"] += clock.seconds["rollout"]
        ctx.loop_seconds += clock.seconds["rollout"]
        metrics.row(
            done,
            {"domain": domain, "accuracy": summary["accuracy"], "length": summary["mean_tokens"]},
            clock.seconds,
        )
    metrics.close()
    write_json(ctx.folder / "results.json", records)
    return compute


def _domain(ctx: Context, model, name: str, domain: str) -> dict:
    config = ctx.config
    prompts = list(prompts_within_limit(ctx, model, domain, "eval", config.prompts.limit))
    if not prompts:
        raise UsageError(f"data.{domain} holds out no prompts", "raise eval_share")
    rollouts = sample_group(ctx, model, prompts, 0, "student")
    if domain == next(iter(ctx.recipe.domains(ctx.name))):
        ctx.show_first(rollouts[0], model.tokenizer, trained=False)
    right, obeyed = [0] * len(prompts), [0] * len(prompts)
    for rollout, verdict in zip(rollouts, ctx.verdicts.verify(rollouts), strict=True):
        right[rollout.group] += int(verdict == 1.0)
        obeyed[rollout.group] += int(ctx.verdicts.obeyed(rollout))
    lengths = [r.length for r in rollouts]
    summary = record(name, domain, config.prompts.samples, right, lengths, obeyed)
    failed = {"verifier_errors": ctx.verdicts.failed[domain]} if ctx.verdicts.failed[domain] else {}
    return {**summary, **failed, "processed": sum(r.forwarded for r in rollouts)}
