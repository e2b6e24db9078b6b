"""The contract of each family: the hooks of a member, and those that it may leave out.

A member inherits from the protocol of its family; sources, engines, verifiers, data and stages
have a base class in their own folder. Every hook that is asked of a class before anything is loaded
(``problems``, ``notes``, ``needs_for`` and the like) has its neutral answer here, so no caller asks
whether it is there. A part that only some members have (a mask, a gate, a memory) is a protocol of
its own, and ``isinstance`` says whether a member has it.

Shapes: N tokens of a step, C of a chunk, B rollouts, K ids. No torch is imported here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from opdctl.errors import Problem
from opdctl.types import Finding, Rollout

if TYPE_CHECKING:
    from torch import Tensor

NOTHING: Mapping[str, float] = MappingProxyType({})


class Member(Protocol):
    """Anything a recipe names.

    Attributes:
        revision: raised by hand when the mathematics changes; part of every fingerprint.
    """

    revision: ClassVar[int]


class StepView(Protocol):
    """All rollouts of one step and their per-token columns, as a member sees them.

    Attributes:
        rollouts: in the order of the columns.
        columns: name -> one number per token, [N]; columns with two axes, [N, M], have one entry
            per teacher of a token.
        sequence_N: the place of each token's rollout.
        model: the policy, for its tokenizer and vocabulary.
        steps: optimizer steps of the stage.
    """

    rollouts: list[Rollout]
    columns: dict[str, Tensor]
    sequence_N: Tensor
    model: Any
    steps: int

    @property
    def done(self) -> int:
        """The optimizer steps taken before this one."""
        ...

    def mean(self, value_N: Tensor) -> Tensor:
        """Return the mean over the tokens of each rollout. Shape [B]."""
        ...

    def largest(self, value_N: Tensor, share: float) -> Tensor:
        """Return True for the largest ``share`` of all tokens, one at least. Shape [N]."""
        ...

    def future(self, value_N: Tensor, discount: float) -> Tensor:
        """Return the discounted sum of all later tokens of the same rollout. Shape [N]."""
        ...

    def so_far(self, value_N: Tensor) -> Tensor:
        """Return the sum up to and with each token of its rollout. Shape [N]."""
        ...

    def places(self) -> tuple[Tensor, Tensor]:
        """Return each token's place in its rollout, from 0, and the rollout's length. [N] each."""
        ...

    def spread(self, value_B: list[float]) -> Tensor:
        """Repeat one number per rollout for each of its tokens. Shape [N]."""
        ...


class Configured(Member, Protocol):
    """A member that is checked against its stage before anything is loaded.

    Attributes:
        needs: the numbers it reads, as ``teacher.logprobs``; validate matches them with what the
            stage's teachers and source provide.
    """

    needs: tuple[str, ...]

    @staticmethod
    def needs_for(config: Any) -> tuple[str, ...]:
        """Return the needs that these keys add to ``needs``."""
        return ()

    @staticmethod
    def problems(config: Any, stage: Any) -> list[Problem]:
        """Return keys that do not fit each other or the stage."""
        return []

    @staticmethod
    def notes(config: Any) -> list[Problem]:
        """Return keys that are well formed and have no effect."""
        return []


class Composed(Configured, Protocol):
    """A member of a loss: a signal, a weight or an objective.

    Attributes:
        logged: the numbers of the step it saw last; a row of metrics has them under its name.
    """

    logged: Mapping[str, float] = NOTHING

    @staticmethod
    def kl_direction(config: Any) -> str:
        """Return the KL to the teacher whose gradient it gives: reverse, forward, states or ""."""
        return ""


class Signal(Composed, Protocol):
    """Per-token credit without a gradient; larger is better.

    Attributes:
        is_baseline: it does not depend on the token that was sampled, so its expected gradient is
            zero; a row of metrics says what it does to the variance.
    """

    is_baseline: ClassVar[bool] = False

    def __init__(self, config: Any, ctx: Any) -> None: ...

    @abstractmethod
    def credit(self, step: StepView) -> Tensor:
        """Return one number per token of the step. Shape [N]."""
        ...


@runtime_checkable
class Live(Protocol):
    """A signal whose credit can follow the policy through the updates of a step.

    Attributes:
        live: it does, by its keys.
    """

    live: bool

    def credit_now(self, view: Any) -> Tensor:
        """Return the credit of each token of a chunk by the policy as it is, no gradient. [C]."""
        ...


class Weight(Composed, Protocol):
    """A per-token factor without a gradient: a mask, a factor or a gate, or several of them.

    Attributes:
        is_importance_weight: it applies the ratio of trainer to sampler.
    """

    is_importance_weight: ClassVar[bool] = False

    def __init__(self, config: Any) -> None: ...

    @staticmethod
    def lets_through(config: Any) -> str:
        """Return ``right`` or ``wrong`` if it keeps only such rollouts, else ""."""
        return ""


@runtime_checkable
class Masks(Protocol):
    """A weight that enters the count of the tokens an objective is divided by."""

    def mask(self, step: StepView) -> Tensor:
        """Return 0 or 1 for each token of the step. Shape [N]."""
        ...


@runtime_checkable
class Scales(Protocol):
    """A weight that does not enter the count."""

    def factor(self, step: StepView) -> Tensor:
        """Return one factor per token of the step. Shape [N]."""
        ...


@runtime_checkable
class Gates(Protocol):
    """A weight that reads the live log-prob inside a chunk."""

    def gate(self, view: Any) -> Tensor:
        """Return one factor per token of the chunk, without a gradient. Shape [C]."""
        ...


class Objective(Composed, Protocol):
    """A per-token loss with a gradient.

    Attributes:
        rows: ``prediction``, the rows before each token, or ``token``, those that have seen it.
        on_policy_only: its expectation is over the student's own next token.
        same_width: what to do where student and teacher differ in width; "" if it may differ.
        fitted: ``fit(states)`` fits something of its own before the first step.
        compares: how many of the teacher's ids it has at hand, enough to log the overlap of.
    """

    rows: ClassVar[str]
    on_policy_only: ClassVar[bool] = False
    same_width: ClassVar[str] = ""
    fitted: ClassVar[bool] = False
    compares: float = 0
    config: Any

    def __init__(self, config: Any) -> None: ...

    @abstractmethod
    def loss(self, view: Any) -> Tensor:
        """Return the loss of each token of a chunk, differentiable. Shape [C]."""
        ...


@runtime_checkable
class Remembers(Protocol):
    """A member that remembers something between steps; checkpoints hold it."""

    def state(self) -> dict[str, Any]:
        """Return JSON values and tensors; the tensors are never changed in place."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` returned."""
        ...


class Controller(Configured, Protocol):
    """Hooks on a step; see ``Starts``, ``Reads`` and ``Acts``."""

    def __init__(self, config: Any, ctx: Any, model: Any) -> None: ...


@runtime_checkable
class Starts(Protocol):
    """A controller that does something before the first step."""

    def start(self) -> None:
        """Begin."""
        ...


@runtime_checkable
class Reads(Protocol):
    """A controller that reads the scored rollouts before the update."""

    def read(self, step: StepView) -> dict[str, Any]:
        """Return what to log."""
        ...


@runtime_checkable
class Acts(Protocol):
    """A controller that may change the weights after the update.

    Attributes:
        sampled: tokens it sampled in its last act, for the ledger.
    """

    sampled: int

    def act(self, done: int) -> dict[str, Any]:
        """Act on the weights after ``done`` steps; return what to log.

        Raises:
            Interrupted: a stop was asked for; every byte is given back.
        """
        ...


class Watchdog(Member, Protocol):
    """Eyes on what a step logs.

    Attributes:
        at_once: it warns at the first sight, not after ``steps`` in a row.
        hint: what to do.
    """

    at_once: ClassVar[bool]
    hint: ClassVar[str]
    config: Any

    def __init__(self, config: Any) -> None: ...

    @abstractmethod
    def look(self, values: dict[str, Any], first: dict[str, Any]) -> dict[str, str]:
        """Return what is wrong with a row, by place, beside the first row's numbers."""
        ...


class Environment(Member, Protocol):
    """Answers to what a response asks, between its turns."""

    def __init__(self, config: Any) -> None: ...

    @abstractmethod
    def reply(self, text: str) -> str | None:
        """Return the answer to a turn that makes a call; None where it makes none."""
        ...


class Reward(Protocol):
    """Whole groups in, one number per rollout out.

    Attributes:
        parameters: of the model it asks, for the ledger.
    """

    parameters: float

    @abstractmethod
    def score(self, rollouts: list[Rollout]) -> None:
        """Set ``reward`` of every rollout."""
        ...


class Teacher(Member, Protocol):
    """Scores for a request.

    Attributes:
        provides: the needs it can serve.
        keeps: it logs its own answers one by one as they come.
        parameters: of its model; 0 behind a server.
        stored: the file with the weight of its head, where ``head`` returns the shape alone.
    """

    provides: ClassVar[tuple[str, ...]]
    keeps: ClassVar[bool]
    parameters: float
    stored: Path | None = None


class Check(Member, Protocol):
    """A check of ``preflight``: is this student, with these teachers, fit to start?

    Attributes:
        samples: it needs rollouts.
        why: what it has cost others.
    """

    samples: ClassVar[bool]
    why: ClassVar[str]

    @abstractmethod
    def findings(self, stage: Any) -> list[Finding]:
        """Return the findings about a checked stage, one a teacher or one in all."""
        ...


class Claim(Member, Protocol):
    """A statement of a report, judged on the measurements of runs.

    Attributes:
        source: the report, and the place in it.
        reported: its numbers.
        threshold: the condition, in words, set before anything was run.
    """

    statement: ClassVar[str]
    source: ClassVar[str]
    reported: ClassVar[str]
    threshold: ClassVar[str]

    @staticmethod
    def problems(roles: Any) -> list[Problem]:
        """Return what the schema cannot see of the roles, with paths below the claim's."""
        return []

    @staticmethod
    @abstractmethod
    def conditions(roles: Any, runs: Any) -> tuple[list[Any], str]:
        """Return the numbers that decide, each with its threshold, and a note.

        Raises:
            KeyError: a number was not measured; names it.
        """
        ...
