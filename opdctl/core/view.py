"""What objectives and gates see of a chunk of tokens, and the weighted sum of their losses.

Per-token weights are inputs, because the gradient is formed before backward: masks, normalisers
and coefficients are in them already. Nothing here divides by a count.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from opdctl.core.chunks import chunked_sum
from opdctl.core.taught import Taught
from opdctl.kernels.head import Head


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
    """What an objective or a gate sees of one chunk of C tokens: numbers per token, no logits.

    Everything but ``entropy_C`` and the columns is differentiable.
    """

    def __init__(self, rows: Any, target_C: Tensor, columns: dict, taught: Taught | None) -> None:
        self.rows, self.target_C = rows, target_C
        self.columns, self.taught = columns, taught
        self.logged: dict[str, Tensor] = {}

    @cached_property
    def logprob_C(self) -> Tensor:
        """Log-prob of the target under the policy being trained."""
        return self.rows.at(self.target_C[:, None])[:, 0]

    @cached_property
    def entropy_C(self) -> Tensor:
        """Entropy of the policy being trained; no gradient."""
        return self.rows.entropy()

    @property
    def score_C(self) -> Tensor:
        """Score of a classifier, one per token."""
        return self.rows.score_C

    @property
    def old_C(self) -> Tensor:
        """Log-prob of the target under the policy as it was when the rollouts were made.

        With one update per rollout that is the policy being trained, and no pass is spent on it.
        """
        return self.columns["policy"] if "policy" in self.columns else self.logprob_C.detach()

    def teacher_logits(self) -> Tensor:
        """Logits of each token's own teacher, [C, V]; the next call overwrites them."""
        return self.taught.logits(self.columns["teacher_index"], self.columns["teacher_row"])

    def divergence(self, direction: str, beta: float, overlap: int) -> Tensor:
        """Divergence to the token's own teacher over the whole vocabulary, [C], never negative.

        Logs it, both entropies, both log-probs of the target, and for ``overlap`` > 0 the share of
        the teacher's ``overlap`` most probable tokens that are among the student's, with the mass
        of those under both.
        """
        teacher_CV = self.teacher_logits()
        ids_CK, both_CK = self.target_C[:, None], None
        if overlap:
            k = min(overlap, teacher_CV.shape[-1])
            top_CK = teacher_CV.topk(k, dim=-1).indices
            both_CK = (top_CK[:, :, None] == self.rows.top(k)[:, None, :]).any(-1)
            ids_CK = torch.cat([ids_CK, top_CK], -1)
        with torch.no_grad():
            logp_CK = self.rows.at(ids_CK, leaf=False)
        value_C, entropy_C, logq_CK = self.rows.divergence(teacher_CV, direction, beta, ids_CK)
        self.log("divergence", value_C)
        self.log("entropy", self.entropy_C)
        self.log("teacher_entropy", entropy_C)
        self.log("student_logprob", logp_CK[:, 0])
        self.log("teacher_logprob", logq_CK[:, 0])
        if both_CK is not None:
            self.log("overlap", both_CK.to(logp_CK.dtype).mean(-1))
            self.log("overlap_mass", (logp_CK[:, 1:].exp() * both_CK).sum(-1))
            self.log("overlap_teacher_mass", (logq_CK[:, 1:].exp() * both_CK).sum(-1))
        return value_C

    def __getitem__(self, column: str) -> Tensor:
        return self.columns[column]

    def log(self, name: str, value_C: Tensor) -> None:
        """Keep a per-token value; metrics report its mean."""
        self.logged[name] = value_C.detach()


def weighted_sum(
    hidden_ND: Tensor,
    head: Head,
    target_N: Tensor,
    columns: dict[str, Tensor],
    terms: list[tuple[Term, Tensor]],
    *,
    rows_of: type,
    size: int,
    taught: Taught | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over tokens and terms of weight x gates x loss, differentiable, in bounded memory.

    Args:
        hidden_ND: rows of the trunk; with teachers, in ascending order of ``teacher_index``.
        target_N: the supervised ids.
        columns: per-token vectors, [N] each.
        terms: objectives with the weight of each token, [N].
        rows_of: level of the row pass.
        size: most rows of a chunk.

    Returns:
        The sum, and the table of what was logged per token, detached, [N] each.
    """
    table: dict[str, Tensor] = {}

    def loss_of(rows: Any, part: slice) -> Tensor:
        cut = {name: column[part] for name, column in columns.items()}
        view = View(rows, target_N[part], cut, taught)
        loss_C = 0.0
        for term, weight_N in terms:
            part_C = weight_N[part] * term.objective.loss(view)
            for gate in term.gates:
                part_C = part_C * gate.gate(view)
            loss_C = loss_C + part_C
        for name, value_C in view.logged.items():
            if name not in table:
                table[name] = value_C.new_zeros(len(hidden_ND))
            table[name][part] = value_C
        return loss_C

    return chunked_sum(loss_of, hidden_ND, head, rows_of, size), table
