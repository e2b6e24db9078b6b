"""The hooks of every source of rollouts, with the defaults of those that a member leaves out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from opdctl.errors import Problem
from opdctl.types import Rollout


class Source(ABC):
    """A source of rollouts; built as ``Source(config, ctx, model)`` with the stage's student.

    Attributes:
        revision: part of every fingerprint; raise it when the mathematics changes.
        samples_from: the ledger's name for the sampler.
        has_logprobs: every rollout has the log-probs of its sampler.
        in_opd: an opd stage may draw from it.
        engines: the engines it can sample by; None is any.
        needs: the numbers it needs of a step; a source needs none.
        parameters: the sampler's parameters, or their mean by tokens over several; 0 if unknown.
        sampled: tokens that the last ``draw`` ran through the sampler.
    """

    revision: ClassVar[int]
    samples_from: ClassVar[Literal["student", "teacher", "dataset", "mixture"]]
    has_logprobs: ClassVar[bool] = False
    in_opd: ClassVar[bool] = False
    engines: ClassVar[tuple[str, ...] | None] = None
    needs: ClassVar[tuple[str, ...]] = ()
    parameters: float = 0
    sampled: int = 0

    @staticmethod
    def student_share(config) -> float:
        """Return the share of the rollouts that the student samples."""
        return 0.0

    @staticmethod
    def problems(config, stage) -> list[Problem]:
        """Return what the schema cannot check of the source's keys in a stage."""
        return []

    @staticmethod
    def notes(config) -> list[Problem]:
        """Return keys that are well formed and have no effect."""
        return []

    @staticmethod
    def needs_for(config) -> tuple[str, ...]:
        """Return the needs that these keys add to ``needs``."""
        return ()

    @property
    def sources(self) -> list[Source]:
        """The sources that sample, each with its own ``parameters`` and ``sampled``."""
        return [self]

    @abstractmethod
    def draw(self, step: int) -> list[Rollout]:
        """Return the rollouts of a step."""
