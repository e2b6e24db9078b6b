"""Means with their intervals: over tokens, over answers to the same prompts, by position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opdctl.checks.diagnosis.nodes import window
from opdctl.intervals import newcombe, wilson
from opdctl.models.packing import per_sequence, token_positions
from opdctl.train.metrics import mean


def rollout_of_token(rollouts: list, device: torch.device) -> Tensor:
    """Return the index of the rollout of each token, over all rollouts in their order. [N]."""
    lengths = torch.tensor([r.length for r in rollouts], device=device)
    return torch.repeat_interleave(torch.arange(len(rollouts), device=device), lengths)


def pool_domains(gains: list[dict]) -> dict:
    """Pool the paired accuracies of a teacher's domains, each prompt counting once."""
    right = [pair for gain in gains for pair in gain["right"]]
    sides = {"student": mean(s for s, _ in right), "teacher": mean(t for _, t in right)}
    return {**sides, "gain": mean(t - s for s, t in right), "prompts": len(right), "right": right}


def summarize_gain(gain: dict) -> dict:
    """Replace the verdicts of a paired accuracy by summaries of them.

    ``ci95`` becomes the 95 % interval for paired verdicts (Newcombe); ``solves`` is the share of
    the prompts failed by the student that the teacher solves, and ``loses`` the share of those
    solved by the student that the teacher fails.
    """
    result = {k: v for k, v in gain.items() if k != "right"}
    result["ci95"] = newcombe(gain["right"])
    for name, side in (("solves", 0.0), ("loses", 1.0)):
        rates = [t if name == "solves" else 1 - t for s, t in gain["right"] if bool(s) == side]
        share = mean(rates)
        result[name] = {"of": len(rates), "mean": share if rates else None}
        result[name]["ci95"] = wilson(share, len(rates)) if rates else None
    return result


def mean_and_interval(value_N: Tensor, sequence_N: Tensor) -> dict:
    """Return the mean over tokens and its 95 % interval, over responses.

    Responses are independent of each other; the tokens of one are not.
    """
    value_N, count = value_N.double(), int(sequence_N.max()) + 1
    centre = float(value_N.mean())
    off_B = per_sequence(value_N - centre, sequence_N, count)
    half = math.inf
    if count > 1:
        half = 1.96 * float((off_B**2).sum() * count / (count - 1)) ** 0.5 / len(value_N)
    return {"mean": centre, "ci95": [centre - half, centre + half]}


def profile(table: dict[str, Tensor], sequence_N: Tensor, count: int) -> list[dict]:
    """Return means by position in the response, in windows that double."""
    place_N, _ = token_positions(sequence_N, count)
    windows, first = [], 0
    while (place_N >= first).any():
        _, last = window(first)
        inside_N = (place_N >= first) & (place_N <= last)
        row = {"from": first, "to": min(last, int(place_N.max())), "tokens": int(inside_N.sum())}
        windows.append(row | {k: float(v[inside_N].double().mean()) for k, v in table.items()})
        first = last + 1
    return windows
