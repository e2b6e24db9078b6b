"""One optimizer step: trunk once, head and losses in chunks, gradient, clip, step.

The only module that divides by a token count. Each objective has a normaliser of its own, counted
over the whole mini-batch before any backward, so neither the micro-batch size nor another
objective changes it. Masks enter the count; gates and ratios do not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opdctl.core.chunks import Raw, rows_in
from opdctl.core.models import Model
from opdctl.core.taught import Taught
from opdctl.core.tokens import last_of_each, micro_batches, pack, per_sequence
from opdctl.core.view import Term, weighted_sum
from opdctl.errors import StageFailed
from opdctl.kernels.select import rows_class
from opdctl.settings import Optim


def lr_at(step: int, steps: int, optim: Optim) -> float:
    """Learning rate of a step, counted from 0. A pure function: there is no scheduler state."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    if optim.schedule == "constant":
        return optim.lr
    done = (step - optim.warmup) / max(1, steps - optim.warmup)
    if optim.schedule == "linear":
        return optim.lr * (1 - (1 - optim.final) * done)
    return optim.lr * (optim.final + (1 - optim.final) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(model: Model, optim: Optim) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay on matrices only."""
    named = [p for p in model.net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in named if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, foreach=True
    )


def normalisers(term: Term, sequence_N: Tensor, count: int, columns: dict) -> Tensor:
    """Per-token factor of a term: its mask over its own count. Shape [N].

    seq_mean gives 1 / (|y| x responses), token_mean 1 / tokens; all over unmasked tokens.
    """
    mask_N = torch.ones(len(sequence_N), device=sequence_N.device, dtype=torch.get_default_dtype())
    for member in term.masks:
        mask_N = mask_N * member.mask(columns)
    if term.normalise == "token_mean":
        return mask_N / mask_N.sum().clamp(min=1)
    length_B = per_sequence(mask_N, sequence_N, count)
    responses = (length_B > 0).sum().clamp(min=1)
    return mask_N / (length_B.clamp(min=1)[sequence_N] * responses)


def accumulate(
    model: Model,
    spans: list,
    columns: dict[str, Tensor],
    terms: list[Term],
    *,
    temperature: float,
    micro_batch: int,
    chunk_mib: int,
    kernel: str = "auto",
    rounded: bool = False,
    taught: Taught | None = None,
) -> tuple[float, dict, int]:
    """Gradient of the loss over ``spans``, added to ``.grad``.

    Args:
        spans: ``(ids, start)``; ``ids[start:]`` is supervised.
        columns: per-token vectors, [N], in the order of the spans.
        kernel: level of the row pass, see kernels/select.py.
        rounded: logits rounded to bfloat16.
        taught: teachers for the columns teacher_index and teacher_row.

    Returns:
        The loss, the per-token table of what was logged ([N] each), tokens processed.
    """
    lengths = [len(ids) - start for ids, start in spans]
    owner = torch.repeat_interleave(torch.arange(len(spans)), torch.tensor(lengths))
    owner_N = owner.to(model.device)
    factor = [t.coef * normalisers(t, owner_N, len(spans), columns) for t in terms]
    weight_N = sum(f.abs() for f in factor)
    which = {t.objective.rows for t in terms}
    assert len(which) == 1, "objectives of one stage read the same rows"
    head = model.projection(temperature, rounded)
    options = {
        "rows_of": Raw if "token" in which else rows_class(kernel, model.device, head.wide),
        "size": rows_in(chunk_mib, head),
        "taught": taught,
    }
    table: dict[str, Tensor] = {}
    total, processed = 0.0, 0
    teacher_N = columns.get("teacher_index")
    order = None if teacher_N is None else last_of_each(teacher_N, torch.tensor(lengths)).tolist()
    for group, tokens_N in micro_batches(spans, micro_batch, model.device, order):
        packed = pack([spans[i] for i in group], model.pad, model.device)
        hidden = model.trunk(packed.ids_BT).last_hidden_state.flatten(0, 1)
        index_N = packed.prediction_N if "prediction" in which else packed.token_N
        kept_N = weight_N[tokens_N].nonzero()[:, 0]
        if teacher_N is not None:  # one teacher's rows together
            kept_N = kept_N[teacher_N[tokens_N[kept_N]].argsort(stable=True)]
        where_N = tokens_N[kept_N]
        loss, found = weighted_sum(
            hidden[index_N[kept_N]],
            head,
            packed.target_N[kept_N],
            {name: column[where_N] for name, column in columns.items()},
            [(term, f[where_N]) for term, f in zip(terms, factor, strict=True)],
            **options,
        )
        for name, value_N in found.items():
            if name not in table:
                table[name] = torch.zeros(len(owner_N), device=model.device)
            table[name][where_N] = value_N.to(table[name].dtype)
        loss.backward()
        total += float(loss.detach())
        processed += packed.positions
    return total, table, processed


def step(model: Model, optimizer: torch.optim.AdamW, lr: float, clip_norm: float) -> float:
    """Clip, step, clear. Returns the gradient norm before clipping.

    Raises:
        StageFailed: the gradient is not finite; the weights are left as they were.
    """
    parameters = [p for p in model.net.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf, foreach=True))
    if not math.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        raise StageFailed("the gradient is not finite", "lower optim.lr, or look at the rollouts")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
