"""The rows and heads that a step's teachers leave behind, and their logits when they are needed.

Of each teacher only the last hidden rows of its tokens are kept, and those of inner layers that an
objective compares; its logits are rebuilt through its head, a chunk at a time (DeepSeek-V4, arXiv
2606.19348). For a served teacher, a list of ids with log-probs is kept instead. Rows come ordered
by teacher. On a GPU one head is resident and the next is copied meanwhile; ``loads`` counts how
often the resident head changed: once per teacher and mini-batch, or where teachers are pooled, and
micro-batch; ``most`` is how many heads were on the device at once. On a CPU heads are where their
models are, unless ``runtime.resident_teachers`` keeps them on disk.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from opdctl.errors import StageFailed
from opdctl.kernels.head import Head
from opdctl.kernels.topk import divergence_on, log_outside
from opdctl.models import tensor_file
from opdctl.scoring.columns import PAIR_WEIGHT, TEACHER_INDEX, TEACHER_ROW

FINITE = "direction: forward or jsd, which are finite there, or a teacher of the whole vocabulary"
TAIL_LEAST = 1e-6  # of a mass of 1; what a list in fp32 cannot tell from 0


@dataclass
class CachedTeacher:
    """A teacher: its head (on any device) and a row for each token it scored; or, without a head,
    what it listed.

    Attributes:
        head: None where no logit of it is rebuilt.
        hidden_ND: last hidden rows; from them the head rebuilds every logit.
        lse_N: log-normaliser, [N]: with it a log-prob at some id needs one row of the head. Kept
            for top-k supports; on the whole vocabulary it would cost a product and save none, and
            the form with a tail needs every logit anyway.
        top_NK: its most probable ids.
        entropy_N: its entropy.
        stored: where the weight of the head is, if the head has none.
        inner_NLD: rows of the layers that belong to the student's inner ones, see
            models/hidden_layers.py.
        name: of the teacher.
        listed: ids, [N, J], and their log-probs: the target, then its most probable ones.
    """

    head: Head | None = None
    hidden_ND: Tensor | None = None
    lse_N: Tensor | None = None
    top_NK: Tensor | None = None
    entropy_N: Tensor | None = None
    stored: Path | None = None
    inner_NLD: Tensor | None = None
    name: str = ""
    listed: tuple[Tensor, Tensor] | None = None

    def rows(self, row_C: Tensor) -> Tensor:
        """Return the last hidden states of some rows, which were kept. Shape [C, D]."""
        assert self.hidden_ND is not None, "a teacher whose logits are rebuilt has its rows kept"
        return self.hidden_ND[row_C]

    def states(self, row_C: Tensor, places: list[int]) -> Tensor:
        """Return hidden states of some rows, [C, L, width].

        Args:
            places: which of the layers kept, the inner ones and then the last.
        """
        inner = [] if self.inner_NLD is None else self.inner_NLD[row_C].unbind(1)
        each = [*inner, self.rows(row_C)] if self.hidden_ND is not None else [*inner]
        return torch.stack([each[place] for place in places], 1)


class TeacherCache:
    """The teachers of one step, by index."""

    def __init__(self, held: list[CachedTeacher], device: torch.device) -> None:
        self.held, self.device, self.loads, self.most = held, device, 0, 0
        self._copies: list[weakref.ref] = []
        self._resident: tuple[int, Head] | None = None
        self._coming: tuple[int, Head] | None = None
        self._buffers: dict[str, Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def logits(self, index_C: Tensor, row_C: Tensor, use: str = "logits") -> Tensor:
        """Return logits of each token's teacher, [C, V], in a buffer that the next call overwrites.

        Args:
            index_C: which teacher, ascending.
            row_C: which of its hidden rows.
            use: names the buffer, for what must outlive another call.
        """
        head = next(held.head for held in self.held if held.head is not None)
        shape = (len(index_C), head.valid_V)
        if use not in self._buffers or len(self._buffers[use]) < shape[0]:
            self._buffers[use] = torch.empty(shape, dtype=head.logits_dtype, device=self.device)
        out_CV = self._buffers[use][: shape[0]]
        for part, index in segments(index_C):
            hidden_CD = self.held[index].rows(row_C[part])
            self._head(index).logits(hidden_CD, out_CV[part])
        return out_CV

    def logprobs_at(
        self, index_C: Tensor, row_C: Tensor, ids_CK: Tensor, outside_CK: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probs of each token's teacher at some ids, [C, K], by the cached normaliser.

        Few ids are read from their rows of the head; many cost less as one product with all. A
        teacher without a head is asked for ids it listed alone.

        Args:
            outside_CK: ids; the log of the mass on all others is wanted too, [C], for which every
                logit is needed, or what the list leaves of 1.
        """
        if all(held.listed is None for held in self.held):
            return self._rebuilt(index_C, row_C, ids_CK, outside_CK)
        scored: list[Tensor] = []
        tails: list[Tensor] = []
        for part, index in segments(index_C):
            outside = None if outside_CK is None else outside_CK[part]
            row, listed = row_C[part], self.held[index].listed
            if listed is not None:
                ids_NJ, logq_NJ = listed
                logq_CK, tail_C = lookup(ids_NJ[row], logq_NJ[row], ids_CK[part], outside)
            else:
                logq_CK, tail_C = self._rebuilt(index_C[part], row, ids_CK[part], outside)
            scored.append(logq_CK)
            if tail_C is not None:
                tails.append(tail_C)
        return torch.cat(scored), torch.cat(tails) if tails else None

    def _rebuilt(
        self, index_C: Tensor, row_C: Tensor, ids_CK: Tensor, outside_CK: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        heads = [held.head for held in self.held if held.head is not None]
        D = max(head.weight_VD.shape[1] for head in heads)
        head, tail_C = heads[0], None
        lse_C = self.gather("lse_N", index_C, row_C)
        if outside_CK is not None or ids_CK.shape[1] * D >= head.valid_V:
            logits_CV = self.logits(index_C, row_C, "gathered")
            logits_CK = logits_CV.gather(-1, ids_CK)
            if outside_CK is not None:
                tail_C = log_outside(logits_CV, outside_CK) - lse_C
        else:
            logits_CK = torch.empty(ids_CK.shape, dtype=head.logits_dtype, device=self.device)
            for part, index in segments(index_C):
                hidden_CD = self.held[index].rows(row_C[part])
                logits_CK[part] = self._head(index).at(hidden_CD, ids_CK[part])
        return logits_CK - lse_C[:, None], tail_C

    def has_all(self, name: str) -> bool:
        """Return True where something is kept of every teacher."""
        return all(getattr(held, name) is not None for held in self.held)

    def gather(self, name: str, index_C: Tensor, row_C: Tensor) -> Tensor:
        """Return rows of something kept of each token's own teacher: lse_N, top_NK, entropy_N."""
        parts = [getattr(self.held[i], name)[row_C[part]] for part, i in segments(index_C)]
        return torch.cat(parts)

    def require_finite(self, value_C: Tensor, index_C: Tensor, hint: str = FINITE) -> None:
        """Check that no teacher makes a number of the tokens infinite.

        Args:
            value_C: a divergence to the tokens' own teachers, or an advantage over them.
            index_C: which teacher.
            hint: what to do instead.

        Raises:
            StageFailed: a side gives no probability to a token that the other may say.
        """
        infinite_C = value_C.detach().isinf()
        if infinite_C.any():
            name = self.held[int(index_C[infinite_C][0])].name or "teacher"
            raise StageFailed(
                f"the divergence to teacher {name} is infinite: one side gives probability 0 to a "
                "token that has some from the other",
                hint,
            )

    def states(self, index_C: Tensor, row_C: Tensor, places: list[int]):
        """Yield runs of tokens of one teacher: where, its name, its states, [run, L, width]."""
        for part, i in segments(index_C):
            yield part, self.held[i].name, self.held[i].states(row_C[part], places)

    def _head(self, index: int) -> Head:
        """Return the head of a teacher, on the device; the next one's copy is started."""
        if self._resident is not None and self._resident[0] == index:
            return self._resident[1]
        self.loads += 1
        coming, self._coming, self._resident = self._coming, None, None  # two heads at most
        head = coming[1] if coming and coming[0] == index else self._copy(index)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self._resident = (index, head)
        following = (index + 1) % len(self.held)
        if following != index and self.held[following].head is not None:
            self._coming = (following, self._copy(following))
        self._copies = [r for r in self._copies if r() is not None]
        heads = [held.head for held in self.held if held.head is not None]
        here = sum(head.weight_VD.device == self.device for head in heads)
        self.most = max(self.most, here + len(self._copies))
        return head

    def _copy(self, index: int) -> Head:
        """Return a head on the device: read from disk, or on a stream of its own copied there."""
        head, stored = self.held[index].head, self.held[index].stored
        assert head is not None, "logits are rebuilt of a teacher whose head is kept"
        if head.weight_VD.device == self.device:
            return head
        if stored is not None:
            copy = replace(head, weight_VD=tensor_file.read(stored)["weight"])
            self._copies.append(weakref.ref(copy.weight_VD))
            return copy
        assert self._stream is not None, "on a CPU a head is where its model is, or on disk"
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            bias_V = head.bias_V
            copy = replace(
                head,
                weight_VD=head.weight_VD.to(self.device, non_blocking=True),
                bias_V=None if bias_V is None else bias_V.to(self.device, non_blocking=True),
            )
        self._copies.append(weakref.ref(copy.weight_VD))
        return copy


@torch.no_grad()
def reverse_kl(
    hidden_ND: Tensor,
    head: Head,
    teacher_cache: TeacherCache,
    columns: dict[str, Tensor],
    *,
    rows_of: type,
    size: int,
    top: int = 0,
) -> Tensor:
    """Return KL(p || q) to each token's own teacher, no gradient. Shape [N], never negative.

    Args:
        hidden_ND: rows of the student's backbone, in the order of the columns.
        columns: ``teacher_index``, ``teacher_row`` and ``pair_weight``, [N, M]; with several
            teachers it is their weighted mean.
        top: on the student's ``top`` most probable ids, both renormalised; 0 is on all.
    """
    index_NM, row_NM, weight_NM = (columns[k] for k in (TEACHER_INDEX, TEACHER_ROW, PAIR_WEIGHT))
    value_NM = torch.zeros_like(weight_NM)
    for place in range(index_NM.shape[1]):
        index_N, row_N = index_NM[:, place], row_NM[:, place]
        for at_C in index_N.argsort(stable=True).split(size):
            rows = rows_of(head.logits(hidden_ND[at_C]), head.operand)
            teacher_CV = teacher_cache.logits(index_N[at_C], row_N[at_C])
            ids_CK = rows.top(min(top, head.valid_V) or 1)
            if top:
                pair = (rows.at(ids_CK, leaf=False), teacher_CV.gather(-1, ids_CK))
                value_C = divergence_on(*pair, ids_CK >= 0, "renormalised", "reverse", 0.5)
            else:
                value_C = rows.divergence(teacher_CV, "reverse", 0.5, ids_CK)[0]
            teacher_cache.require_finite(value_C, index_N[at_C], "leave kl_baseline and tip out")
            value_NM[at_C, place] = value_C
    total_N = weight_NM.sum(1)
    return (weight_NM * value_NM).sum(1) / torch.where(total_N > 0, total_N, 1.0)


def lookup(
    ids_CJ: Tensor, logq_CJ: Tensor, ids_CK: Tensor, outside_CK: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return log-probs at some ids out of lists that hold them, [C, K], and of all others, [C].

    A list's log-probs are rounded, by some 1e-7 each, so the mass outside is what they leave of 1
    and not below TAIL_LEAST.
    """
    logq_CK, there = _found(ids_CJ, logq_CJ, ids_CK)
    assert there.all(), "a list is asked for what is in it"
    if outside_CK is None:
        return logq_CK, None
    inside_CK = _found(ids_CJ, logq_CJ, outside_CK)[0].double()
    tail_C = (-inside_CK.exp().sum(-1)).add(1.0).clamp(min=TAIL_LEAST).log()
    return logq_CK, tail_C.to(logq_CJ.dtype)


def _found(ids_CJ: Tensor, value_CJ: Tensor, ids_CK: Tensor) -> tuple[Tensor, Tensor]:
    same_CKJ = ids_CK[:, :, None] == ids_CJ[:, None, :]
    place_CK = same_CKJ.to(torch.uint8).argmax(-1)
    return value_CJ.gather(-1, place_CK), same_CKJ.any(-1)


def segments(index_C: Tensor) -> list[tuple[slice, int]]:
    """Return runs of equal values: where, and which value."""
    indices, counts = index_C.unique_consecutive(return_counts=True)
    stops = counts.cumsum(0)
    bounds = zip((stops - counts).tolist(), stops.tolist(), indices.tolist(), strict=True)
    return [(slice(start, stop), index) for start, stop, index in bounds]
