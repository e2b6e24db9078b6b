"""One optimizer step: backbone once, head and losses in chunks, gradient, clip, step.

The only module that divides by a token count. Each objective has a normaliser of its own, counted
over the whole mini-batch before any backward, so neither the micro-batch size nor another
objective changes it. Masks enter the count; gates and ratios do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opdctl.config.settings import Optim
from opdctl.kernels.chunks import ScalarRows, rows_in
from opdctl.kernels.select import rows_class
from opdctl.loss.token_teacher import (
    gather_columns,
    once_per_token,
    order_by_teacher,
    pooled_mean,
)
from opdctl.loss.token_view import LossTerm, weighted_sum
from opdctl.models.hidden_layers import Layers, forward_kwargs, hidden_states
from opdctl.models.model import Model
from opdctl.models.packing import last_per_sequence, micro_batches, pack, per_sequence
from opdctl.scoring.asks import Pass
from opdctl.scoring.columns import DOMAIN, PAIR_WEIGHT, TEACHER_INDEX
from opdctl.scoring.teacher_cache import TeacherCache
from opdctl.types import ScoreRequest


def lr_at(step: int, steps: int, optim: Optim) -> float:
    """Return the learning rate of a step, counted from 0; a pure function without state."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    if optim.schedule == "constant":
        return optim.lr
    done = (step - optim.warmup) / max(1, steps - optim.warmup)
    if optim.schedule == "linear":
        return optim.lr * (1 - (1 - optim.final) * done)
    return optim.lr * (optim.final + (1 - optim.final) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(model: Model, optim: Optim) -> torch.optim.AdamW:
    """Return AdamW with decoupled weight decay on matrices only."""
    named = list(model.trainable_parameters().values())
    groups = [
        {"params": [p for p in named if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
    )


def normalisers(term: LossTerm, sequence_N: Tensor, count: int, columns: dict) -> Tensor:
    """Return the per-token factor of a term: its mask over its count, times its factors. [N].

    seq_mean gives 1 / (|y| x responses), token_mean 1 / tokens; domain_mean 1 / tokens of the
    domain, times its share of the responses: long answers of one domain do not drown another's
    (Open-MOPD, arXiv 2608.19098, found 20 % of the prompts with .9 % of the gradient). All over
    unmasked tokens.
    """
    mask_N = torch.ones(len(sequence_N), device=sequence_N.device, dtype=torch.get_default_dtype())
    for member in term.masks:
        mask_N = mask_N * member.mask(columns)
    scale_N = _counted(mask_N, term.normalise, sequence_N, count, columns)
    for member in term.factors:
        scale_N = scale_N * member.mask(columns)
    return scale_N


def _counted(mask_N, normalise: str, sequence_N, count: int, columns: dict) -> Tensor:
    if normalise == "token_mean":
        return mask_N / mask_N.sum().clamp(min=1)
    length_B = per_sequence(mask_N, sequence_N, count)
    if normalise == "domain_mean":
        domain_N = columns[DOMAIN]
        tokens_D = per_sequence(mask_N, domain_N, int(domain_N.max()) + 1)
        each_N = mask_N / length_B.clamp(min=1)[sequence_N]  # adds up to one per response
        share_D = per_sequence(each_N, domain_N, len(tokens_D)) / each_N.sum().clamp(min=1)
        return mask_N * (share_D / tokens_D.clamp(min=1))[domain_N]
    responses = (length_B > 0).sum().clamp(min=1)
    return mask_N / (length_B.clamp(min=1)[sequence_N] * responses)


@dataclass
class UpdateResult:
    """The result of one optimizer step: what ``accumulate`` made and what the loop did with it.

    Attributes:
        loss: its value.
        table: what was logged per token, [N] each, 0 for a token that no objective gives a weight;
            ``masked``, where masks or factors may take it, says which.
        processed: tokens that went through the model.
        norm: of the gradient before clipping; this and what follows is set by the loop.
        taken: the weights moved.
        lr: the learning rate.
        teachers: how many have tokens in it.
    """

    loss: float = 0.0
    table: dict[str, Tensor] = field(default_factory=dict)
    processed: int = 0
    norm: float = math.nan
    taken: bool = False
    lr: float = 0.0
    teachers: int = 0


def accumulate(
    model: Model,
    spans: list[ScoreRequest],
    columns: dict[str, Tensor],
    terms: list[LossTerm],
    run: Pass,
    teacher_cache: TeacherCache | None = None,
    layers: Layers | None = None,
) -> UpdateResult:
    """Add the gradient of the loss over ``spans`` to ``.grad``.

    Args:
        spans: their targets are supervised.
        columns: per-token vectors, [N], in the order of the spans.
        teacher_cache: teachers for the columns teacher_index and teacher_row.
        layers: the layers whose hidden states are compared; None means the last only.
    """
    lengths = torch.tensor(list(map(len, spans)))
    owner_N = torch.repeat_interleave(torch.arange(len(spans)), lengths).to(model.device)
    factors = [t.coef * normalisers(t, owner_N, len(spans), columns) for t in terms]
    weight_N = sum(factor_N.abs() for factor_N in factors)
    (reads,) = {t.objective.rows for t in terms}  # objectives of one stage read the same rows
    options = _loss_options(model, terms, run, reads == "token", layers)
    options["teacher_cache"] = teacher_cache
    inner = layers.inner if layers is not None else ()
    result = UpdateResult()
    if any(t.masks or t.factors for t in terms):
        result.table["masked"] = (weight_N == 0).to(torch.float32)
    teacher_NM = columns.get(TEACHER_INDEX)
    pooled, order = teacher_NM is not None and teacher_NM.shape[1] > 1, None
    if teacher_NM is not None:  # sequences of one teacher together, so that its head is read once
        order = last_per_sequence(teacher_NM[:, 0], lengths).tolist()
    for group, tokens_N in micro_batches(spans, run.micro_batch, model.device, order):
        packed = pack([spans[i] for i in group], model.pad, model.device, model.one_row)
        out = model.backbone(**packed.inputs, **forward_kwargs(inner, model))
        hidden = out.last_hidden_state.flatten(0, 1)
        index_N = packed.token_N if reads == "token" else packed.prediction_N
        kept_N = weight_N[tokens_N].nonzero()[:, 0]
        place_N = torch.zeros_like(kept_N)
        if teacher_NM is not None:
            kept_N, place_N = order_by_teacher(kept_N, tokens_N, columns)
        where_N = tokens_N[kept_N]
        cut = gather_columns(columns, where_N, place_N)
        if inner:
            options["inner_NLD"] = hidden_states(model, out, index_N[kept_N], inner)
        del out
        pairs = zip(terms, factors, strict=True)
        loss, logged = weighted_sum(
            hidden[index_N[kept_N]],
            target_N=packed.target_N[kept_N],
            columns=cut,
            terms=[(t, once_per_token(t, f_N[where_N], place_N)) for t, f_N in pairs],
            **options,
        )
        pair_weight_P = cut[PAIR_WEIGHT] if pooled else None
        _scatter(result.table, logged, where_N, pair_weight_P, len(owner_N))
        loss.backward()
        result.loss += float(loss.detach())
        result.processed += packed.positions
    return result


def _loss_options(
    model: Model,
    terms: list[LossTerm],
    run: Pass,
    scalar: bool,
    layers: Layers | None,
) -> dict:
    """Return the arguments of ``weighted_sum`` that are the same for every micro-batch."""
    head = model.lm_head(run.temperature, run.rounded)
    options = {
        "head": head,
        "rows_of": ScalarRows
        if scalar
        else rows_class(run.kernel, model.device, head.logits_dtype),
        "size": rows_in(run.chunk_mib, head, *_in_chunk(layers, terms)),
    }
    return options if layers is None else options | {"layers": layers}


def _scatter(
    table: dict[str, Tensor],
    logged: dict[str, Tensor],
    where_P: Tensor,
    weight_P: Tensor | None,
    count: int,
) -> None:
    """Put what a micro-batch logged at its tokens, in rows of ``count``.

    Args:
        weight_P: of each pair, where teachers are pooled: then it is their mean.
    """
    for name, value_P in logged.items():
        if name not in table:
            table[name] = torch.zeros(count, device=where_P.device)
        value_P = value_P.to(table[name].dtype)
        if weight_P is not None:
            table[name] += pooled_mean(value_P, weight_P.to(value_P.dtype), where_P, count)
        else:
            table[name][where_P] = value_P


def _in_chunk(layers: Layers | None, terms: list[LossTerm]) -> tuple[int, bool]:
    """Return how many hidden states of a row are compared, and whether any logits are made."""
    return len(layers.selected) if layers else 0, any(t.reads_logits for t in terms)


def step(
    model: Model, optimizer: torch.optim.AdamW, lr: float, clip_norm: float, loss: float = 0.0
) -> tuple[float, bool]:
    """Clip, step, clear. Where the loss or the gradient is not finite there is no step: weights and
    moments stay as they were.

    Returns:
        The gradient norm before clipping, and whether the step was taken.
    """
    parameters = [p for p in model.trainable_parameters().values() if p.grad is not None]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf, foreach=True))
    taken = math.isfinite(norm) and math.isfinite(loss)
    if taken:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        if model.masters is not None:
            model.masters.publish()
    optimizer.zero_grad(set_to_none=True)
    return norm, taken
