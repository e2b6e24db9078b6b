"""Means with their intervals: of what tokens say, of paired answers, by position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opdctl.checks.diagnosis.nodes import window
from opdctl.intervals import newcombe, wilson
from opdctl.models.packing import per_sequence, token_positions
from opdctl.train.metrics import mean


def owners(rollouts: list, device: torch.device) -> Tensor:
    """Which rollout each of their tokens belongs to. Shape [N]."""
    lengths = torch.tensor([r.length for r in rollouts], device=device)
    return torch.repeat_interleave(torch.arange(len(rollouts), device=device), lengths)


def pooled(found: list[dict]) -> dict:
    """The domains of a teacher together, each prompt counting once."""
    right = [pair for one in found for pair in one["right"]]
    sides = {"student": mean(s for s, _ in right), "teacher": mean(t for _, t in right)}
    return {**sides, "gain": mean(t - s for s, t in right), "prompts": len(right), "right": right}


def told_gain(found: dict) -> dict:
    """A paired gain with its 95 % interval and, in place of the verdicts, what the teacher solves
    of what the student fails, and fails of what it solves."""
    result = {k: v for k, v in found.items() if k != "right"}
    result["ci95"] = newcombe(found["right"])
    for what, side in (("solves", 0.0), ("loses", 1.0)):
        given = [t if what == "solves" else 1 - t for s, t in found["right"] if bool(s) == side]
        share = mean(given)
        result[what] = {"of": len(given), "mean": share if given else None}
        result[what]["ci95"] = wilson(share, len(given)) if given else None
    return result


def spread(value_N: Tensor, sequence_N: Tensor) -> dict:
    """Mean over tokens, and its 95 % interval: responses are independent, their tokens are not."""
    value_N, count = value_N.double(), int(sequence_N.max()) + 1
    centre = float(value_N.mean())
    off_B = per_sequence(value_N - centre, sequence_N, count)
    half = math.inf
    if count > 1:
        half = 1.96 * float((off_B**2).sum() * count / (count - 1)) ** 0.5 / len(value_N)
    return {"mean": centre, "ci95": [centre - half, centre + half]}


def profile(table: dict[str, Tensor], sequence_N: Tensor, count: int) -> list[dict]:
    """Means by position in the response, in windows that double."""
    place_N, _ = token_positions(sequence_N, count)
    found, first = [], 0
    while (place_N >= first).any():
        _, last = window(first)
        inside_N = (place_N >= first) & (place_N <= last)
        row = {"from": first, "to": min(last, int(place_N.max())), "tokens": int(inside_N.sum())}
        found.append(row | {k: float(v[inside_N].double().mean()) for k, v in table.items()})
        first = last + 1
    return found
