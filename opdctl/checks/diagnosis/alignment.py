"""Do the signals point where the task wants, on wrong rollouts and on right ones?

At some nodes of the student's rollouts each of a few tokens is forced, the student goes on, and the
verifier judges: that gives the ideal update of the node, and each signal's cosine with it
(``directions.py``). Means are over rollouts, whose nodes are averaged first. A node from which
every token succeeds alike has no ideal update and is left out, counted. The teacher goes on from
the same prefixes too: what it makes of ground that the student prepared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from opdctl.checks.diagnosis import directions
from opdctl.checks.diagnosis.nodes import Node, choose, success, window
from opdctl.train.evaluation import half_width
from opdctl.train.metrics import mean


def alignment(
    ctx: Any,
    models: list,
    rollouts: list,
    see: Callable[[list[Node], Tensor], directions.Seen],
    effort: Any,
    told: Callable[[str], None],
) -> dict:
    """``alignment`` and ``reach`` of one teacher.

    Args:
        models: the student, and the teacher where it can be sampled from here.
        rollouts: the student's, judged.
        see: nodes, and the place of each among the rollouts' tokens, [N] -> both sides there.

    Raises:
        Interrupted: a stop was asked for.
    """
    verdicts = [r.right for r in rollouts]
    width = min(effort.top, models[0].valid_V)
    nodes = choose(rollouts, verdicts, max(1, effort.budget // (width * effort.samples)), ctx.seed)
    first_B = [0, *accumulate(r.length for r in rollouts)]
    seen = see(nodes, torch.tensor([first_B[n.rollout] + n.depth for n in nodes]))
    forced = seen.ids_NK.tolist()
    whole = len(nodes) * width * effort.samples
    told(f"{len(nodes)} nodes, {whole} continuations by the student")
    given = (ctx, models[0], rollouts, nodes, forced, effort.samples)
    found = success(*given, lambda done: told(f"{done} of {whole} continuations"))
    found_NKS = torch.tensor(found, dtype=torch.float64)
    reached_N = None
    if len(models) > 1:
        told("the teacher goes on from the same prefixes")
        theirs = success(ctx, models[1], rollouts, nodes, [[None]] * len(nodes), effort.samples)
        reached_N = torch.tensor(theirs, dtype=torch.float64).mean((1, 2))
    wrong_N = torch.tensor([not verdicts[n.rollout] for n in nodes])
    return {
        "alignment": judged(seen, found_NKS, nodes, wrong_N),
        "reach": reach(seen, found_NKS.mean(-1), reached_N, nodes, wrong_N, mean(verdicts)),
    }


def judged(
    seen: directions.Seen, found_NKS: Tensor, nodes: list[Node], wrong_N: Tensor
) -> dict[str, Any]:
    """Cosines of each signal with the ideal update, by the rollout's outcome; ``behind`` is how far
    it is behind the best of the teacher's, node by node.

    Args:
        found_NKS: verdicts of the continuations of each candidate.
        wrong_N: whether the node's rollout failed.
    """
    success_NK = found_NKS.mean(-1)
    g_NK = directions.ideal(seen.logp_NK, success_NK)
    live_N = g_NK.norm(dim=-1) > 1e-12
    values = {name: directions.cosine(g_NK, step_NK) for name, step_NK in seen.steps.items()}
    single = {
        "sampled": directions.single_draws(seen, g_NK),
        "outcome": directions.outcome_draws(seen.logp_NK, success_NK),
    }
    values["outcome"] = torch.ones_like(values["sampled"])
    halves = found_NKS.chunk(2, dim=-1) if found_NKS.shape[-1] > 1 else ()
    split = [directions.ideal(seen.logp_NK, part.mean(-1)) for part in halves]
    signals: dict[str, dict] = {}
    counts = {}
    for side, inside_N in (("wrong", wrong_N), ("right", ~wrong_N)):
        kept_N = inside_N & live_N
        owner = [n.rollout for n, kept in zip(nodes, kept_N.tolist(), strict=True) if kept]
        counts[side] = {
            "nodes": int(inside_N.sum()),
            "undecided": int((inside_N & ~live_N).sum()),
            "rollouts": len(set(owner)),
            "halves": over(directions.cosine(*split)[kept_N], owner) if split else None,
        }
        exact = [n for n in values if n != "outcome"]
        best_N = values[max(exact, key=lambda n: over(values[n][kept_N], owner)["mean"] or 0.0)]
        for name, cos_N in values.items():
            entry = signals.setdefault(name, {}).setdefault(side, over(cos_N[kept_N], owner))
            entry["behind"] = over((best_N - cos_N)[kept_N] / 2, owner, 2.0)
            if name in single:
                draw_N, noise_N = (x[kept_N] for x in single[name])
                entry["one_draw"] = over(draw_N, owner)["mean"]
                finite_N = noise_N[noise_N.isfinite()]
                entry["noise"] = float(finite_N.median()) if len(finite_N) else None
    mass_N = seen.logp_NK.exp().sum(-1)
    return {"candidates": float(mass_N.mean()), "sides": counts, "signals": signals}


def reach(
    seen: directions.Seen,
    success_NK: Tensor,
    reached_N: Tensor | None,
    nodes: list[Node],
    wrong_N: Tensor,
    accuracy: float,
) -> dict[str, Any]:
    """What the teacher makes of the student's prefixes, by the rollout's outcome.

    ``student`` and ``teacher``: success rate of either from there, the student's over the
    candidates; ``beyond``: the difference; ``advantage``: by how much the teacher's choice of the
    next token alone, the student going on, succeeds more often. ``first_order`` is the sum of that
    over the tokens of a response: the gain of a small step towards the teacher at every prefix, per
    unit (performance difference lemma, Kakade and Langford 2002).

    Args:
        accuracy: of the student, which weighs right rollouts against wrong ones.
    """
    p_NK, q_NK = seen.logp_NK.softmax(-1), seen.logq_NK.softmax(-1)
    own_N = (p_NK * success_NK).sum(-1)
    advantage_N = ((q_NK - p_NK) * success_NK).sum(-1)
    values = {
        "student": own_N,
        "advantage": advantage_N,
    }
    if reached_N is not None:
        values |= {"teacher": reached_N, "beyond": reached_N - own_N}
    found: dict[str, Any] = {}
    centre, square = 0.0, 0.0
    for side, inside_N in (("wrong", wrong_N), ("right", ~wrong_N)):
        some = [(n, i) for i, n in enumerate(nodes) if inside_N[i]]
        owner = [n.rollout for n, _ in some]
        found[side] = {name: over(value_N[inside_N], owner) for name, value_N in values.items()}
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
    found["first_order"] = {"mean": centre, "ci95": ends}
    if math.isnan(centre):
        found["first_order"] = {"mean": None, "ci95": None}
    spans = sorted({window(n.depth) for n in nodes})
    found["profile"] = []
    for first, last in spans:
        here_N = torch.tensor([first <= n.depth <= last for n in nodes])
        row = {"from": first, "to": last, "nodes": int(here_N.sum())}
        found["profile"].append(row | {k: float(v[here_N].mean()) for k, v in values.items()})
    return found


def over(value_N: Tensor, owner: list[int], scale: float = 1.0) -> dict:
    """``scale`` times the mean over rollouts of the mean of their nodes, each from -1 to 1, with
    its 95 % interval."""
    of: dict[int, list[float]] = {}
    for rollout, value in zip(owner, value_N.tolist(), strict=True):
        of.setdefault(rollout, []).append(value)
    each = [mean(values) for values in of.values()]
    if not each:
        return {"mean": None, "ci95": None}
    half = half_width(each) if len(each) > 1 else 1.0
    ends = [max(-1.0, mean(each) - half), min(1.0, mean(each) + half)]
    return {"mean": scale * mean(each), "ci95": [scale * end for end in ends]}
