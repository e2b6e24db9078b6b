"""Hidden states of both sides, for an objective that is fitted to them before the first step."""

from __future__ import annotations

import torch
from torch import Tensor

from opdctl.models.model import Model
from opdctl.scoring.score import score
from opdctl.scoring.teacher_cache import CachedTeacher
from opdctl.train.context import Context
from opdctl.train.score_step import score_step
from opdctl.train.step import TrainSetup
from opdctl.types import FORWARD, Compute, Rollout


def states_for_fit(
    rollouts: list[Rollout],
    model: Model,
    parts: TrainSetup,
    ctx: Context,
    compute: Compute,
    which: str,
) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """Hidden states of both sides at the same tokens, for an objective that is fitted to them.

    Args:
        which: layers, as in the objective's needs.

    Returns:
        For each teacher asked its name, the policy's states and its own, [N', L, width] each, and
        a number for the prompt of each token, [N'], the same wherever the prompt comes again.
    """
    step, requests = score_step(rollouts, model, parts, ctx, compute), [r.request for r in rollouts]
    found = score(
        model,
        requests,
        temperature=parts.temperature,
        want=("hidden", "inner"),
        layers=parts.layers,
        micro_batch=ctx.runtime.micro_batch,
        check=ctx.check,
    )
    compute.flops["train"] += FORWARD * model.parameters * sum(len(q.ids) for q in requests)
    own = CachedTeacher(None, found.hidden_ND, inner_NLD=found.inner_NLD)
    numbers = [int(r.prompt.id, 16) >> 1 for r in rollouts]  # 63 bits: a signed integer holds them
    prompt_N = torch.tensor(numbers, device=model.device)[step.sequence_N]
    places, pairs = parts.layers.state_indices(which), []
    asked_NM = step.columns["pair_weight"] != 0
    for i, held in enumerate(step.teacher_cache.held):
        at_N, place_N = (asked_NM & (step.columns["teacher_index"] == i)).nonzero(as_tuple=True)
        theirs_NLD = held.states(step.columns["teacher_row"][at_N, place_N], places)
        pairs.append((held.name, own.states(at_N, places), theirs_NLD, prompt_N[at_N]))
    return pairs
