"""Compare each signal with the update that the task wants, on wrong and on right rollouts.

At some nodes of the student's rollouts each of a few tokens is forced, the student goes on, and the
verifier judges: that gives the ideal update of the node, and each signal's cosine with it
(``directions.py``). Means are over rollouts, whose nodes are averaged first. A node from which
every token succeeds equally often has no ideal update; it is left out, and the number of those is
reported. The teacher goes on from the same prefixes too, to tell what it can still make of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from opdctl.checks.diagnosis import directions
from opdctl.checks.diagnosis.nodes import Node, choose_nodes, continuation_verdicts, window
from opdctl.train.evaluation import half_width
from opdctl.train.metrics import mean


def alignment(
    ctx: Any,
    models: list,
    rollouts: list,
    score_at: Callable[[list[Node], Tensor], directions.NodeScores],
    effort: Any,
    progress: Callable[[str], None],
) -> dict:
    """Return ``alignment`` and ``reach`` of one teacher.

    Args:
        models: the student, and the teacher where it can be sampled from here.
        rollouts: the student's rollouts, judged.
        score_at: scores both sides at the nodes; takes the nodes and the index of each among the
            tokens of all rollouts, [N].
        effort: an ``Effort`` of ``measure.py``.

    Raises:
        Interrupted: a stop was requested.
    """
    verdicts = [r.right for r in rollouts]
    width = min(effort.top, models[0].valid_V)
    most = max(1, effort.budget // (width * effort.samples))
    nodes = choose_nodes(rollouts, verdicts, most, ctx.seed)
    first_B = [0, *accumulate(r.length for r in rollouts)]
    scores = score_at(nodes, torch.tensor([first_B[n.rollout] + n.depth for n in nodes]))
    forced = scores.ids_NK.tolist()
    count = len(nodes) * width * effort.samples
    progress(f"{len(nodes)} nodes, {count} continuations by the student")
    outcomes = continuation_verdicts(
        ctx,
        models[0],
        rollouts,
        nodes,
        forced,
        effort.samples,
        lambda done: progress(f"{done} of {count} continuations"),
    )
    verdict_NKS = torch.tensor(outcomes, dtype=torch.float64)
    reached_N = None
    if len(models) > 1:
        progress("the teacher goes on from the same prefixes")
        theirs = continuation_verdicts(
            ctx, models[1], rollouts, nodes, [[None]] * len(nodes), effort.samples
        )
        reached_N = torch.tensor(theirs, dtype=torch.float64).mean((1, 2))
    wrong_N = torch.tensor([not verdicts[n.rollout] for n in nodes])
    return {
        "alignment": signal_cosines(scores, verdict_NKS, nodes, wrong_N),
        "reach": reach(scores, verdict_NKS.mean(-1), reached_N, nodes, wrong_N, mean(verdicts)),
    }


def signal_cosines(
    scores: directions.NodeScores, verdict_NKS: Tensor, nodes: list[Node], wrong_N: Tensor
) -> dict[str, Any]:
    """Return the cosine of each signal with the ideal update, by the rollout's outcome.

    ``behind`` is half the mean gap to the cosine of the best exact signal, node by node.

    Args:
        verdict_NKS: verdicts of the continuations of each candidate.
        wrong_N: True where the node's rollout failed.
    """
    success_NK = verdict_NKS.mean(-1)
    g_NK = directions.ideal(scores.logp_NK, success_NK)
    live_N = g_NK.norm(dim=-1) > 1e-12
    values = {name: directions.cosine(g_NK, step_NK) for name, step_NK in scores.directions.items()}
    draws = {
        "sampled": directions.sampled_draws(scores, g_NK),
        "outcome": directions.outcome_draws(scores.logp_NK, success_NK),
    }
    values["outcome"] = torch.ones_like(values["sampled"])
    halves = verdict_NKS.chunk(2, dim=-1) if verdict_NKS.shape[-1] > 1 else ()
    split = [directions.ideal(scores.logp_NK, part.mean(-1)) for part in halves]
    signals: dict[str, dict] = {}
    counts = {}
    for side, inside_N in (("wrong", wrong_N), ("right", ~wrong_N)):
        kept_N = inside_N & live_N
        owner = [n.rollout for n, kept in zip(nodes, kept_N.tolist(), strict=True) if kept]
        counts[side] = {
            "nodes": int(inside_N.sum()),
            "undecided": int((inside_N & ~live_N).sum()),
            "rollouts": len(set(owner)),
            "halves": rollout_mean(directions.cosine(*split)[kept_N], owner) if split else None,
        }
        exact = [n for n in values if n != "outcome"]
        best_N = values[
            max(exact, key=lambda n: rollout_mean(values[n][kept_N], owner)["mean"] or 0.0)
        ]
        for name, cos_N in values.items():
            entry = signals.setdefault(name, {}).setdefault(
                side, rollout_mean(cos_N[kept_N], owner)
            )
            entry["behind"] = rollout_mean((best_N - cos_N)[kept_N] / 2, owner, 2.0)
            if name in draws:
                draw_N, noise_N = (x[kept_N] for x in draws[name])
                entry["one_draw"] = rollout_mean(draw_N, owner)["mean"]
                finite_N = noise_N[noise_N.isfinite()]
                entry["noise"] = float(finite_N.median()) if len(finite_N) else None
    mass_N = scores.logp_NK.exp().sum(-1)
    return {"candidates": float(mass_N.mean()), "sides": counts, "signals": signals}


def reach(
    scores: directions.NodeScores,
    success_NK: Tensor,
    reached_N: Tensor | None,
    nodes: list[Node],
    wrong_N: Tensor,
    accuracy: float,
) -> dict[str, Any]:
    """Return the success rates that are reached from the student's prefixes, by outcome.

    ``student`` and ``teacher``: the success rate of either from there, the student's over the
    candidates; ``beyond``: the difference; ``advantage``: the rise in success when the teacher
    chooses the next token only and the student goes on. ``first_order`` is the sum of advantages
    over the tokens of a response: the gain of a small step towards the teacher at every prefix, per
    unit (performance difference lemma, Kakade and Langford 2002).

    Args:
        success_NK: success rate of the student from each candidate.
        reached_N: success rate of the teacher; None where it was not sampled.
        wrong_N: True where the node's rollout failed.
        accuracy: the student's, which weighs right rollouts against wrong ones.
    """
    p_NK, q_NK = scores.logp_NK.softmax(-1), scores.logq_NK.softmax(-1)
    own_N = (p_NK * success_NK).sum(-1)
    advantage_N = ((q_NK - p_NK) * success_NK).sum(-1)
    values = {
        "student": own_N,
        "advantage": advantage_N,
    }
    if reached_N is not None:
        values |= {"teacher": reached_N, "beyond": reached_N - own_N}
    entry: dict[str, Any] = {}
    centre, square = 0.0, 0.0
    for side, inside_N in (("wrong", wrong_N), ("right", ~wrong_N)):
        some = [(n, i) for i, n in enumerate(nodes) if inside_N[i]]
        owner = [n.rollout for n, _ in some]
        entry[side] = {
            name: rollout_mean(value_N[inside_N], owner) for name, value_N in values.items()
        }
        share = 1 - accuracy if side == "wrong" else accuracy
        sums: dict[int, float] = {}
        for node, i in some:
            gained = node.stands_for * float(advantage_N[i])
            sums[node.rollout] = sums.get(node.rollout, 0.0) + gained
        if share and not sums:
            centre = math.nan  # a part of the rollouts was not looked at
        centre += share * mean(sums.values())
        square += (share * half_width(list(sums.values()))) ** 2
    ends = [centre - square**0.5, centre + square**0.5]
    entry["first_order"] = {"mean": centre, "ci95": ends}
    if math.isnan(centre):
        entry["first_order"] = {"mean": None, "ci95": None}
    spans = sorted({window(n.depth) for n in nodes})
    entry["profile"] = []
    for first, last in spans:
        here_N = torch.tensor([first <= n.depth <= last for n in nodes])
        row = {"from": first, "to": last, "nodes": int(here_N.sum())}
        entry["profile"].append(row | {k: float(v[here_N].mean()) for k, v in values.items()})
    return entry


def rollout_mean(value_N: Tensor, owner: list[int], scale: float = 1.0) -> dict:
    """Return ``scale`` times the mean over rollouts of the mean over their nodes.

    Args:
        value_N: a number from -1 to 1 for each node.
        owner: the rollout of each node.

    Returns:
        ``mean`` and its 95 % interval ``ci95``; both None without a node.
    """
    by_rollout: dict[int, list[float]] = {}
    for rollout, value in zip(owner, value_N.tolist(), strict=True):
        by_rollout.setdefault(rollout, []).append(value)
    each = [mean(values) for values in by_rollout.values()]
    if not each:
        return {"mean": None, "ci95": None}
    half = half_width(each) if len(each) > 1 else 1.0
    ends = [max(-1.0, mean(each) - half), min(1.0, mean(each) + half)]
    return {"mean": scale * mean(each), "ci95": [scale * end for end in ends]}
