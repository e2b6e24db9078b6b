"""Choose prefixes of the student's rollouts, and let a model go on from each to see if it succeeds.

The depths of a response fall into windows 0, 1, 2-3, 4-7 and so on, one node in each, so the number
of nodes grows with the logarithm of the length, and the budget bounds it (Unmasking OPD, arXiv
2605.10889). Wrong and right rollouts take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opdctl import draws
from opdctl.rollout.sampling import finish_rollouts
from opdctl.types import Rollout


@dataclass(frozen=True)
class Node:
    """The prefix of a response.

    Attributes:
        rollout: index of the student's rollout.
        depth: tokens of the response before it.
        stands_for: depths of the rollout that are in its window.
    """

    rollout: int
    depth: int
    stands_for: int = 1


def window(depth: int) -> tuple[int, int]:
    """Return the first and last depth of a depth's window: (0, 0), (1, 1), (2, 3), (4, 7), ..."""
    if not depth:
        return 0, 0
    first = 1 << (depth.bit_length() - 1)
    return first, 2 * first - 1


def choose_nodes(
    rollouts: Sequence[Rollout], right: Sequence[float], most: int, seed: int
) -> list[Node]:
    """Return at most ``most`` nodes, whole rollouts at a time, wrong and right ones in turn.

    Only the first turn of a rollout has nodes. A pure function of the arguments.
    """
    order = draws.permutation(len(rollouts), seed, "nodes").tolist()
    sides = [[i for i in order if bool(right[i]) == side] for side in (False, True)]
    turn_by_turn = [i for pair in zip(*sides, strict=False) for i in pair]
    rest = sides[0][len(sides[1]) :] or sides[1][len(sides[0]) :]
    nodes: list[Node] = []
    for i in [*turn_by_turn, *rest]:
        rollout = rollouts[i]
        length = rollout.observed[0][0] if rollout.observed else len(rollout.response_ids)
        depth, of_rollout = 0, []
        while depth < length:
            first, last = window(depth)
            last = min(last, length - 1)
            spot = draws.unit(seed, "depth", rollout.prompt.id, first)
            size = last - first + 1
            of_rollout.append(Node(i, first + int(spot * size), size))
            depth = last + 1
        if nodes and len(nodes) + len(of_rollout) > most:
            break
        nodes += of_rollout[:most]
    return nodes


def continuation_verdicts(
    ctx,
    model,
    rollouts: Sequence[Rollout],
    nodes: Sequence[Node],
    forced: Sequence[Sequence[int | None]],
    samples: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[list[float]]]:
    """Return the verifier's verdicts on continuations of each node: [N, K, samples].

    The draws of a sample are the same for every id of a node, so the id is the only difference.

    Args:
        model: the model that goes on.
        forced: K ids for each node; each is put after the prefix in turn, None puts nothing.
        progress: called with the number of continuations done, now and then.

    Raises:
        Interrupted: a stop was requested.
    """
    begun, keys = [], []
    for node, ids in zip(nodes, forced, strict=True):
        rollout = rollouts[node.rollout]
        prefix = rollout.response_ids[: node.depth]
        for forced_id in ids:
            for sample in range(samples):
                response = [*prefix, *([] if forced_id is None else [forced_id])]
                new = Rollout(rollout.prompt, rollout.prompt_ids, response, [])
                begun.append(new)
                keys.append(draws.key(ctx.seed, "continue", rollout.prompt.id, node.depth, sample))
    verdicts: list[float] = []
    size = max(1, ctx.runtime.wave)
    for start in range(0, len(begun), size):
        part = slice(start, start + size)
        finish_rollouts(ctx, model, begun[part], keys[part])
        verdicts += ctx.verdicts.verify(begun[part])
        progress(min(start + size, len(begun)))
    by_node, at = [], 0
    for ids in forced:
        rows = []
        for _ in ids:
            rows.append(verdicts[at : at + samples])
            at += samples
        by_node.append(rows)
    return by_node
