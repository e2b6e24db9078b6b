"""One optimizer step: backbone once, head and losses in chunks, gradient, clip, step.

The only module that divides by a token count. Each objective has a normaliser of its own, counted
over the whole mini-batch before any backward, so neither the micro-batch size nor another
objective changes it. Masks enter the count; gates and ratios do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
from opdctl.train.gradient_sums import wide_sums
from opdctl.types import ScoreRequest


def lr_at(step: int, steps: int, optim: Optim) -> float:
    """Return the learning rate of a step, counted from 0; a pure function without state.

    The first step after the warm-up has the whole rate and the last one ``final`` of it; where they
    are the same step, it is the last.
    """
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    if optim.schedule == "constant":
        return optim.lr
    fall = steps - 1 - optim.warmup
    done = (step - optim.warmup) / fall if fall > 0 else 1.0
    left = 1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return optim.lr * (optim.final + (1 - optim.final) * left)


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
class Batch:
    """The tokens of one optimizer step and what is minimised on them.

    Attributes:
        spans: their targets are supervised.
        columns: per-token vectors, [N] or [N, M], in the order of the spans.
        terms: the objectives.
        teacher_cache: teachers for the columns teacher_index and teacher_row.
        layers: the layers whose hidden states are compared; None means the last only.
        credits: signals whose credit follows the policy through the updates of a step, with their
            coefficients.
    """

    spans: list[ScoreRequest]
    columns: dict[str, Tensor]
    terms: list[LossTerm]
    teacher_cache: TeacherCache | None = None
    layers: Layers | None = None
    credits: Sequence[tuple[float, Any]] = ()

    @property
    def lengths(self) -> Tensor:
        """The supervised tokens of each span. Shape [B]."""
        return torch.tensor(list(map(len, self.spans)))

    def factors(self, device: torch.device) -> list[Tensor]:
        """Return the weight of each token in each term, [N]: see ``normalisers``."""
        sequence_N = torch.repeat_interleave(torch.arange(len(self.spans)), self.lengths).to(device)
        counted = (sequence_N, len(self.spans), self.columns)
        return [term.coef * normalisers(term, *counted) for term in self.terms]

    def is_empty(self, device: torch.device) -> bool:
        """Return True where masks and factors leave no token a weight in any term."""
        return not any(bool(factor_N.any()) for factor_N in self.factors(device))


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
        empty: there was no token to learn from, so no step was tried.
        lr: the learning rate.
        teachers: how many have tokens in it.
    """

    loss: float = 0.0
    table: dict[str, Tensor] = field(default_factory=dict)
    processed: int = 0
    norm: float = math.nan
    taken: bool = False
    empty: bool = False
    lr: float = 0.0
    teachers: int = 0

    @property
    def shut(self) -> bool:
        """True where there are gates and they let no token through."""
        gates_N = self.table.get("gate_open")
        return gates_N is not None and not bool(gates_N.any())

    @classmethod
    def of_nothing(cls, count: int, device: torch.device) -> UpdateResult:
        """Return the result of a batch of ``count`` tokens that are all masked."""
        masked_N = torch.ones(count, dtype=torch.float32, device=device)
        return cls(table={"masked": masked_N}, norm=0.0, empty=True)


def accumulate(model: Model, batch: Batch, run: Pass) -> UpdateResult:
    """Add the gradient of the loss over a batch to ``.grad``, summed in at least fp32.

    Raises:
        StageFailed: the loss is infinite, as a teacher gives no probability to a token that the
            student may say.
    """
    lengths, terms, columns = batch.lengths, batch.terms, batch.columns
    factors = batch.factors(model.device)
    weight_N = sum((f_N.abs() for f_N in factors[1:]), factors[0].abs())
    (reads,) = {t.objective.rows for t in terms}  # objectives of one stage read the same rows
    options = _loss_options(model, batch, run, reads == "token")
    inner = batch.layers.inner if batch.layers is not None else ()
    result = UpdateResult()
    if any(t.masks or t.factors for t in terms):
        result.table["masked"] = (weight_N == 0).to(torch.float32)
    teacher_NM = columns.get(TEACHER_INDEX)
    pooled, order = teacher_NM is not None and teacher_NM.shape[1] > 1, None
    if teacher_NM is not None:  # sequences of one teacher together, so that its head is read once
        order = last_per_sequence(teacher_NM[:, 0], lengths).tolist()
    groups = micro_batches(batch.spans, run.micro_batch, model.device, order)
    with wide_sums(model, len(groups)):
        for group, tokens_N in groups:
            spans = [batch.spans[i] for i in group]
            packed = pack(spans, model.pad, model.device, model.one_row)
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
            _scatter(result.table, logged, where_N, pair_weight_P, len(weight_N))
            loss.backward()
            result.loss += float(loss.detach())
            result.processed += packed.positions
    return result


def _loss_options(model: Model, batch: Batch, run: Pass, scalar: bool) -> dict[str, Any]:
    """Return the arguments of ``weighted_sum`` that are the same for every micro-batch."""
    head, layers = model.lm_head(run.temperature, run.rounded), batch.layers
    row_class = ScalarRows if scalar else rows_class(run.kernel, model.device, head.logits_dtype)
    options: dict[str, Any] = {
        "head": head,
        "rows_of": row_class,
        "size": rows_in(run.chunk_mib, head, *_in_chunk(layers, batch.terms)),
        "teacher_cache": batch.teacher_cache,
        "credits": batch.credits,
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
    model: Model,
    optimizer: torch.optim.AdamW,
    lr: float,
    clip_norm: float,
    loss: float = 0.0,
    shut: bool = False,
) -> tuple[float, bool]:
    """Clip, step, clear. Where the loss or the gradient is not finite there is no step: weights and
    moments stay as they were. Nor is there where gates let nothing through and the gradient is 0.

    Args:
        shut: the gates let nothing through.

    Returns:
        The gradient norm before clipping, and whether the step was taken.
    """
    parameters = [p for p in model.trainable_parameters().values() if p.grad is not None]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf, foreach=True))
    taken = math.isfinite(norm) and math.isfinite(loss) and not (shut and norm == 0.0)
    if taken:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        if model.masters is not None:
            model.masters.publish()
    optimizer.zero_grad(set_to_none=True)
    return norm, taken
