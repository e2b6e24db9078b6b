"""The hidden states of both sides, for an objective that is fitted to them before the first
step."""

from __future__ import annotations

import torch
from torch import Tensor

from opdctl.models.model import Model
from opdctl.scoring.asks import Asks, Pass
from opdctl.scoring.columns import PAIR_WEIGHT, TEACHER_INDEX, TEACHER_ROW
from opdctl.scoring.quantities import HIDDEN, INNER
from opdctl.scoring.score import score
from opdctl.scoring.teacher_cache import CachedTeacher
from opdctl.train.context import Context
from opdctl.train.score_step import score_step
from opdctl.train.step import TrainSetup
from opdctl.types import FORWARD, Compute, Rollout


def states_for_fit(
    rollouts: list[Rollout],
    model: Model,
    setup: TrainSetup,
    ctx: Context,
    compute: Compute,
    which: str,
) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """Return hidden states of both sides at the same tokens, for an objective fitted to them.

    Args:
        which: layers, as in the objective's needs.

    Returns:
        For each teacher asked its name, the policy's states and its own, [N', L, width] each, and
        a number for the prompt of each token, [N'], the same wherever the prompt comes again.
    """
    step, requests = score_step(rollouts, model, setup, ctx, compute), [r.request for r in rollouts]
    layers, cache = setup.teacher_asks.layers, step.teacher_cache
    assert layers is not None and cache is not None, "what is fitted compares hidden states"
    asks, run = Asks.of(HIDDEN, INNER, layers=layers), Pass.of(ctx, setup.temperature)
    scores = score(model, requests, asks, run)
    compute.flops["train"] += FORWARD * model.parameters * sum(len(q.ids) for q in requests)
    own = CachedTeacher(None, scores.hidden_ND, inner_NLD=scores.inner_NLD)
    numbers = [int(r.prompt.id, 16) >> 1 for r in rollouts]  # 63 bits: a signed integer holds them
    prompt_N = torch.tensor(numbers, device=model.device)[step.sequence_N]
    places, pairs = layers.state_indices(which), []
    taught_NM = step.columns[PAIR_WEIGHT] != 0
    for i, held in enumerate(cache.held):
        at_N, place_N = (taught_NM & (step.columns[TEACHER_INDEX] == i)).nonzero(as_tuple=True)
        theirs_NLD = held.states(step.columns[TEACHER_ROW][at_N, place_N], places)
        pairs.append((held.name, own.states(at_N, places), theirs_NLD, prompt_N[at_N]))
    return pairs
