"""The row of metrics of one step: what its rollouts are and what its updates logged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opdctl.models import packing
from opdctl.scoring import overlap
from opdctl.scoring.columns import BEHAVIOUR, POLICY
from opdctl.train.metrics import by_domain, joined, mean, means
from opdctl.train.step import Step, TrainSetup
from opdctl.train.update import UpdateResult
from opdctl.types import Rollout


def step_metrics(
    step: Step,
    updates: list[UpdateResult],
    setup: TrainSetup,
    kernel: str,
    verdicts: list[float] | None = None,
) -> dict[str, Any]:
    """Return what a step's row says of its rollouts and its updates.

    Args:
        updates: one for each optimizer step, in their order, and for each mini-batch that had no
            token for one. Loss and norm are means over the steps that were tried.
        kernel: the level of the row pass.
        verdicts: of the rollouts, where their accuracy is logged.
    """
    rollouts, lengths = step.rollouts, [r.length for r in step.rollouts]
    tried = [u for u in updates if not u.empty]
    values: dict[str, Any] = {
        "loss": mean(u.loss for u in tried),
        "grad_norm": mean(u.norm for u in tried),
        "lr": updates[-1].lr,
        "kernel": kernel,
        "rollouts": len(rollouts),
        "tokens": sum(lengths),
        "length": mean(lengths),
        "truncated": mean(float(r.truncated) for r in rollouts),
    }
    if skipped := sum(not u.taken for u in tried):
        values["skipped"] = skipped
    if len(tried) < len(updates):
        values["empty_updates"] = len(updates) - len(tried)
    if step.teacher_cache is not None:
        values["teachers"] = sum(u.teachers for u in updates)  # of each mini-batch, together
    if setup.rewards:
        values["reward"] = mean(r.reward for r in rollouts)
        values["reward_by_domain"] = by_domain(rollouts, [r.reward for r in rollouts])
    if verdicts is not None:
        values["accuracy"] = by_domain(rollouts, verdicts)
    logged = _logged(updates, lengths, setup)
    kept_N = logged["masked"] == 0 if "masked" in logged else None
    of_domains = {}
    if "divergence" in logged and setup.updates == 1:
        of_domains["divergence_by_domain"] = _by_domain(step, logged["divergence"], kept_N)
    of_tokens = _token_means(step, logged, kept_N, setup)
    return joined(values, of_tokens, sampler_metrics(step, logged, setup), of_domains)


def _logged(
    updates: list[UpdateResult], lengths: list[int], setup: TrainSetup
) -> dict[str, Tensor]:
    """Return what was logged per token, of one update after another; 0 where an update did not log
    it, as it had no token that counts. Shape [updates x N] each."""
    slices = packing.minibatch_slices(lengths, setup.minibatches)
    counts = [tokens.stop - tokens.start for _, tokens in slices] * setup.updates
    table: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for u in updates for name in u.table):
        like = next(u.table[name] for u in updates if name in u.table)
        pairs = zip(updates, counts, strict=True)
        table[name] = torch.cat([u.table.get(name, like.new_zeros(n)) for u, n in pairs])
    return table


def _token_means(
    step: Step, logged: dict[str, Tensor], kept_N: Tensor | None, setup: TrainSetup
) -> dict[str, float]:
    """Return the mean of each per-token number over the kept tokens; the overlap's numbers are
    taken out of ``logged`` and are over the student's own alone."""
    own_N = step.spread([r.source == "student" for r in step.rollouts]).bool()
    own_N = own_N.repeat(setup.updates)
    own = {name: logged.pop(name) for name in overlap.NAMES if name in logged}
    return means(logged, kept_N) | means(own, own_N if kept_N is None else own_N & kept_N)


def sampler_metrics(step: Step, logged: dict[str, Tensor], setup: TrainSetup) -> dict[str, float]:
    """Return what the sampler's own log-probs say: ``sampled_nll``, an unbiased estimate of the
    entropy of what was sampled from, and how far the trainer's are from them, on average."""
    if BEHAVIOUR not in step.columns:
        return {}
    behaviour_N = step.columns[BEHAVIOUR]
    values = {"sampled_nll": -float(behaviour_N.mean())}
    ours_N = step.columns.get(POLICY)
    mixed = setup.source.samples_from != "student"
    if mixed or setup.temperature != setup.sampled_at:
        return values  # the two sides are not the same distribution
    if ours_N is None and setup.updates * setup.minibatches == 1:
        ours_N = logged.get("student_logprob")  # the weights that sampled
    if ours_N is not None:
        gap_N = (ours_N - behaviour_N).abs()
        if "masked" in logged:
            gap_N = gap_N[logged["masked"][: len(gap_N)] == 0]  # the same in each update
        values["logprob_gap"] = float(gap_N.sum()) / max(1, len(gap_N))
    return values


def _by_domain(step: Step, value_N: Tensor, kept_N: Tensor | None) -> dict[str, float]:
    """Return the mean over each rollout's kept tokens, by domain; rollouts without any are out."""
    kept_N = torch.ones_like(step.sequence_N) if kept_N is None else kept_N
    sums_B, kept_B = (
        packing.per_sequence(v_N, step.sequence_N, len(step.rollouts)).tolist()
        for v_N in (value_N, kept_N.to(value_N.dtype))
    )
    each: list[tuple[Rollout, float]] = [
        (r, s / n) for r, s, n in zip(step.rollouts, sums_B, kept_B, strict=True) if n
    ]
    return by_domain([r for r, _ in each], [v for _, v in each])
