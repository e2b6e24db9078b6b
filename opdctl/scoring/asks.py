"""The two halves of a question to a model: what is asked of the tokens, and how the pass is run."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from opdctl.scoring.quantities import HIDDEN, QUANTITIES, REBUILT, TOPK_LIST, Quantity

if TYPE_CHECKING:
    from opdctl.models.hidden_layers import Layers


@dataclass(frozen=True)
class Asks:
    """The numbers and rows that are asked of a model about each target token.

    Attributes:
        quantities: names of ``QUANTITIES``, and of what is more than a number: hidden, inner,
            topk, topk_logprobs, topk_list.
        top: k of the most probable ids.
        layers: the student's layers whose hidden states are compared; inner rows are those of the
            layers that belong to them.
        head: logits will be rebuilt from the hidden rows, so the head is kept too.
    """

    quantities: frozenset[str] = frozenset({"logprobs"})
    top: int = 16
    layers: Layers | None = None
    head: bool = True

    @classmethod
    def of(cls, *names: str, **fields: Any) -> Asks:
        """Ask for some names."""
        return cls(frozenset(names), **fields)

    def __bool__(self) -> bool:
        return bool(self.quantities)

    def __contains__(self, name: str) -> bool:
        return name in self.quantities

    @property
    def numbers(self) -> list[Quantity]:
        """The rows of the table that are asked for, in its order."""
        return [row for need, row in QUANTITIES.items() if need in self.quantities]

    @property
    def logprobs_alone(self) -> bool:
        """The mark of an answer that is small enough to be logged."""
        return self.quantities == {"logprobs"}

    @property
    def list_size(self) -> int:
        """The entries of a list that answer it; 0 where none is needed."""
        sizes = [q.list_size or self.top for q in self.numbers if q.of_list]
        if TOPK_LIST in self:
            sizes.append(self.top)
        return max(sizes, default=0)

    def rebuilding(self) -> Asks:
        """Return the same, with what rebuilds the logits in the place of lists."""
        if TOPK_LIST not in self:
            return self
        return replace(self, quantities=self.quantities - {TOPK_LIST} | REBUILT)

    def of_teacher(self, provides: Collection[str]) -> Asks:
        """Return what is asked of one teacher, which has hidden rows or gives lists."""
        if f"teacher.{HIDDEN}" in provides:
            return self.rebuilding()
        names = frozenset(n for n in self.quantities if f"teacher.{n}" in provides)
        return replace(self, quantities=names)


@dataclass(frozen=True)
class Pass:
    """The way a model is run over tokens.

    Attributes:
        temperature: divides the logits.
        micro_batch: sequences per forward pass; 0 is as many as are alike in length.
        chunk_mib: memory for the logits of one chunk; 0 as in ``rows_in``.
        kernel: level of the loss's row pass, see kernels/select.py.
        rounded: logits rounded to bfloat16.
        check: called before each forward pass; may raise to stop.
    """

    temperature: float = 1.0
    micro_batch: int = 0
    chunk_mib: int = 0
    kernel: str = "auto"
    rounded: bool = False
    check: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, ctx: Any, temperature: float) -> Pass:
        """Return the pass that a stage's runtime keys describe."""
        runtime = ctx.runtime
        return cls(
            temperature=temperature,
            micro_batch=runtime.micro_batch,
            chunk_mib=runtime.chunk_mib,
            kernel=runtime.kernel,
            rounded=runtime.rounded_logits,
            check=ctx.check,
        )


LOGPROBS = Asks()
NOTHING = Asks.of()
PLAIN = Pass()
