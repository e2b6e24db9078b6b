"""One optimizer step: trunk once, head and losses in chunks, gradient, clip, step.

The only module that divides by a token count. Each objective has a normaliser of its own, counted
over the whole mini-batch before any backward, so neither the micro-batch size nor another
objective changes it. Masks enter the count; gates and ratios do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from opdctl.core.chunks import chunked_sum, rows_in
from opdctl.core.models import Model
from opdctl.core.scoring import target_logprob
from opdctl.core.tokens import micro_batches, pack, per_sequence
from opdctl.errors import StageFailed
from opdctl.settings import Optim


@dataclass
class Term:
    """One objective of the loss, with what scales it.

    Attributes:
        objective: has ``rows`` (prediction or token) and ``loss(view) -> [C]``.
        coef: factor in the loss.
        normalise: seq_mean or token_mean.
        masks: members of ``weights/`` with ``mask(columns) -> [N]``; they enter the count.
        gates: members of ``weights/`` with ``gate(view) -> [C]``; they do not.
    """

    objective: Any
    coef: float = 1.0
    normalise: str = "seq_mean"
    masks: list = field(default_factory=list)
    gates: list = field(default_factory=list)


class View:
    """What an objective or a gate sees of one chunk of C tokens."""

    def __init__(
        self,
        model: Model,
        hidden_CD: Tensor,
        target_C: Tensor,
        columns: dict,
        temperature: float,
        teachers: Sequence[tuple[Model, Tensor]] = (),
    ) -> None:
        self.model, self.hidden_CD, self.target_C = model, hidden_CD, target_C
        self.columns, self.temperature, self.teachers = columns, temperature, teachers
        self.logged: dict[str, Tensor] = {}

    @cached_property
    def logits_CV(self) -> Tensor:
        """Differentiable logits of the policy being trained."""
        return self.model.logits(self.hidden_CD, self.temperature)

    @cached_property
    def logprob_C(self) -> Tensor:
        """Differentiable log-prob of the target under the policy being trained."""
        return target_logprob(self.logits_CV, self.target_C)

    @cached_property
    def teacher_logits_CV(self) -> Tensor:
        """Logits of each token's own teacher, rebuilt through its head; no gradient.

        Rows come ordered by teacher, so a chunk reads few heads. Cut to the valid vocabulary.
        """
        index_C, row_C = self.columns["teacher_index"], self.columns["teacher_row"]
        parts = []
        with torch.no_grad():
            for index in index_C.unique_consecutive().tolist():
                teacher, hidden_ND = self.teachers[index]
                hidden_CD = hidden_ND[row_C[index_C == index]]
                logits_CV = teacher.logits(hidden_CD, self.temperature)
                parts.append(logits_CV[:, : self.model.valid_V])
        return torch.cat(parts)

    @cached_property
    def score_C(self) -> Tensor:
        """Differentiable score of a classifier, one per token."""
        return self.model.head(self.hidden_CD)[:, 0]

    @property
    def old_C(self) -> Tensor:
        """Log-prob of the target under the policy as it was when the rollouts were made.

        With one update per rollout that is the policy being trained, and no pass is spent on it.
        """
        return self.columns["policy"] if "policy" in self.columns else self.logprob_C.detach()

    def __getitem__(self, column: str) -> Tensor:
        return self.columns[column]

    def log(self, name: str, value_C: Tensor) -> None:
        """Keep a per-token value; metrics report its mean."""
        self.logged[name] = value_C.detach()


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
    teachers: Sequence[tuple[Model, Tensor]] = (),
) -> tuple[float, dict, int]:
    """Gradient of the loss over ``spans``, added to ``.grad``.

    Args:
        spans: ``(ids, start)``; ``ids[start:]`` is supervised.
        columns: per-token vectors, [N], in the order of the spans.
        teachers: model and hidden rows of each, for the columns teacher_index and teacher_row.

    Returns:
        The loss, the per-token table of what was logged ([N] each), tokens processed.
    """
    lengths = [len(ids) - start for ids, start in spans]
    owner = torch.repeat_interleave(torch.arange(len(spans)), torch.tensor(lengths))
    owner_N = owner.to(model.device)
    factor = [t.coef * normalisers(t, owner_N, len(spans), columns) for t in terms]
    weight_N = sum(f.abs() for f in factor)
    rows = {t.objective.rows for t in terms}
    assert len(rows) == 1, "objectives of one stage read the same rows"
    head = [p for p in model.head.parameters() if p is not None]
    table: dict[str, Tensor] = {}
    total, processed = 0.0, 0
    for group, tokens_N in micro_batches(spans, micro_batch, model.device):
        packed = pack([spans[i] for i in group], model.pad, model.device)
        hidden = model.trunk(packed.ids_BT).last_hidden_state.flatten(0, 1)
        index_N = packed.prediction_N if "prediction" in rows else packed.token_N
        kept_N = weight_N[tokens_N].nonzero()[:, 0]
        if "teacher_index" in columns:  # one teacher's rows together
            kept_N = kept_N[columns["teacher_index"][tokens_N[kept_N]].argsort(stable=True)]
        where_N = tokens_N[kept_N]
        hidden_ND = hidden[index_N[kept_N]]

        def loss_of(hidden_CD, part, packed=packed, kept_N=kept_N, where_N=where_N):
            at_C = where_N[part]
            cut = {name: column[at_C] for name, column in columns.items()}
            target_C = packed.target_N[kept_N[part]]
            view = View(model, hidden_CD, target_C, cut, temperature, teachers)
            loss_C = 0.0
            for term, f in zip(terms, factor, strict=True):
                part_C = f[at_C] * term.objective.loss(view)
                for gate in term.gates:
                    part_C = part_C * gate.gate(view)
                loss_C = loss_C + part_C
            for name, value_C in view.logged.items():
                if name not in table:
                    table[name] = torch.zeros(len(owner_N), device=model.device)
                table[name][at_C] = value_C.to(table[name].dtype)
            return loss_C

        size = rows_in(chunk_mib, model.head.weight.shape[0])
        loss = chunked_sum(loss_of, hidden_ND, head, size)
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
