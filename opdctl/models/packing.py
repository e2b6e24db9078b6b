"""Ragged sequences <-> rectangles. The only place that shifts or sums along a sequence.

A batch has N supervised tokens, flat, in the order of its sequences. The prediction row of the
token at position p is position p - 1: the hidden state that predicts it. The token row is p
itself: the state that has seen it. Nothing outside this module knows either rule.

Suffixes: B sequences, T positions, N supervised tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from opdctl.types import ScoreRequest


class Inputs(TypedDict):
    """The keyword arguments of a backbone over packed sequences."""

    input_ids: Tensor
    use_cache: bool
    position_ids: NotRequired[Tensor]


@dataclass
class Packed:
    """Sequences in one right-padded rectangle, or one after another in one row without padding.

    Causal attention never sees the padding; in one row, positions that start again at 0 keep the
    sequences apart, where the model reads them so (``models/logits_check.py`` looks).

    Attributes:
        ids_BT: token ids; [1, T] in one row.
        position_BT: places within the sequences; None where every sequence has a row of its own.
        target_N: the supervised ids.
        prediction_N: rows of the flattened [B*T] backbone output that predict them.
        token_N: rows of the flattened [B*T] backbone output that have seen them.
        sequence_N: the index of each token's sequence.
        length_B: supervised tokens of each sequence.
        positions: tokens that are not padding, for the ledger.
    """

    ids_BT: Tensor
    target_N: Tensor
    prediction_N: Tensor
    token_N: Tensor
    sequence_N: Tensor
    length_B: Tensor
    positions: int
    position_BT: Tensor | None = None

    @property
    def inputs(self) -> Inputs:
        """The keyword arguments of the backbone; without a cache, as nothing is generated."""
        arguments: Inputs = {"input_ids": self.ids_BT, "use_cache": False}
        if self.position_BT is not None:
            arguments["position_ids"] = self.position_BT
        return arguments


def pack(
    spans: Sequence[ScoreRequest],
    pad: int,
    device: torch.device | str = "cpu",
    one_row: bool = False,
) -> Packed:
    """Pack spans; their targets are supervised. A span without a target is allowed."""
    length = [len(span.ids) for span in spans]
    B, T = len(spans), max(length, default=1)
    position_BT = None
    if one_row:
        B, T = 1, max(1, sum(length))
        position_BT = torch.zeros(1, T, dtype=torch.long)
    ids_BT = torch.full((B, T), pad, dtype=torch.long)
    target, token, sequence, lengths = [], [], [], []
    start = 0
    for b, span in enumerate(spans):
        if position_BT is not None:
            position_BT[0, start : start + length[b]] = torch.arange(length[b])
        first = start if one_row else b * T
        ids_BT.view(-1)[first : first + length[b]] = torch.tensor(span.ids, dtype=torch.long)
        start += length[b]
        places = span.targets
        target.extend(span.ids[p] for p in places)
        token.extend(first + p for p in places)
        sequence.extend([b] * len(places))
        lengths.append(len(places))
    token_N = torch.tensor(token, dtype=torch.long)
    packed = Packed(
        ids_BT=ids_BT,
        target_N=torch.tensor(target, dtype=torch.long),
        prediction_N=token_N - 1,
        token_N=token_N,
        sequence_N=torch.tensor(sequence, dtype=torch.long),
        length_B=torch.tensor(lengths, dtype=torch.long),
        positions=sum(length),
        position_BT=position_BT,
    )
    for name, value in vars(packed).items():
        if isinstance(value, Tensor):
            setattr(packed, name, value.to(device))
    return packed


def per_sequence(values_N: Tensor, sequence_N: Tensor, count: int) -> Tensor:
    """Return the sum of the values of each sequence's tokens. Shape [B]."""
    zeros_B = torch.zeros(count, dtype=values_N.dtype, device=values_N.device)
    return zeros_B.index_add_(0, sequence_N, values_N)


def token_positions(sequence_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return each token's place in its sequence, from 0, and that sequence's length, [N] each."""
    length_B = torch.bincount(sequence_N, minlength=count)
    start_B = length_B.cumsum(0) - length_B
    index_N = torch.arange(len(sequence_N), device=sequence_N.device)
    return index_N - start_B[sequence_N], length_B[sequence_N]


def cumulative_sum(values_N: Tensor, sequence_N: Tensor, count: int) -> Tensor:
    """Return the sum of each token's value and those before it in its sequence. Shape [N]."""
    place_N, length_N = token_positions(sequence_N, count)
    width = int(length_N.max()) if len(length_N) else 0
    value_BT = values_N.new_zeros(count, width)
    value_BT[sequence_N, place_N] = values_N
    return value_BT.cumsum(1)[sequence_N, place_N]


def discounted_future_sum(
    values_N: Tensor, sequence_N: Tensor, count: int, discount: float
) -> Tensor:
    """Return for each token the sum of discount^(j - 1) x the j-th value after it, within its
    sequence. Shape [N]."""
    place_N, length_N = token_positions(sequence_N, count)
    width = int(length_N.max()) if len(length_N) else 0
    value_BT = values_N.new_zeros(count, width + 1)
    value_BT[sequence_N, place_N] = values_N
    after_BT = torch.zeros_like(value_BT)
    for t in range(width - 1, -1, -1):
        after_BT[:, t] = value_BT[:, t + 1] + discount * after_BT[:, t + 1]
    return after_BT[sequence_N, place_N]


def lists_per_sequence(values_N: Tensor, lengths: Sequence[int]) -> list[list[float]]:
    """Return one list of values per sequence, for logs."""
    return [part.tolist() for part in values_N.detach().cpu().split(list(lengths))]


def last_per_sequence(values_N: Tensor, length_B: Tensor) -> Tensor:
    """Return the value at each sequence's last supervised token; 0 if it has none. Shape [B]."""
    last_B = length_B.cumsum(0) - 1
    return torch.where(length_B > 0, values_N[last_B.clamp(min=0)], values_N.new_zeros(()))


def minibatch_slices(lengths: Sequence[int], count: int) -> list[tuple[slice, slice]]:
    """Cut into ``count`` contiguous parts, as even as can be: slices of sequences and of tokens."""
    out, token = [], 0
    for k in range(count):
        start, stop = k * len(lengths) // count, (k + 1) * len(lengths) // count
        size = sum(lengths[start:stop])
        if stop > start:
            out.append((slice(start, stop), slice(token, token + size)))
        token += size
    return out


def micro_batches(
    spans: Sequence[ScoreRequest],
    size: int,
    device: torch.device | str = "cpu",
    first: Sequence[int] | None = None,
) -> list[tuple[list[int], Tensor]]:
    """Group sequences of similar length, so that little of a rectangle is padding.

    Args:
        size: most sequences in a group; 0 is as many as differ by less than a third in length.
        first: a key per sequence to order by before its length (its teacher).

    Returns:
        For each group, the indices of its sequences and of their supervised tokens, [N'].
    """
    total = [len(span.ids) for span in spans]
    offset = [0]
    for span in spans:
        offset.append(offset[-1] + len(span))
    key = first if first is not None else [0] * len(spans)
    groups: list[list[int]] = []
    for i in sorted(range(len(spans)), key=lambda i: (key[i], -total[i], i)):
        group = groups[-1] if groups else []
        if size:
            full = len(group) >= size
        else:
            short, long = sorted((total[i], total[group[0]] if group else total[i]))
            full = len(group) >= 16 and 3 * short < 2 * long
        if not groups or full:
            groups.append([i])
        else:
            group.append(i)
    index = [[t for i in group for t in range(offset[i], offset[i + 1])] for group in groups]
    return [
        (group, torch.tensor(tokens, dtype=torch.long, device=device))
        for group, tokens in zip(groups, index, strict=True)
    ]
