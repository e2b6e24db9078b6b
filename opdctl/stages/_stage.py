"""The hooks of every stage kind, with the defaults of those that a kind leaves out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from opdctl.errors import Problem
from opdctl.types import Compute


class Stage(ABC):
    """A kind of stage; its keys are the nested ``Config``.

    Attributes:
        revision: part of every fingerprint; raise it when the mathematics changes.
        writes: the kind of model it leaves in ``output/``; "" is none.
        uses: the members it uses whatever its keys, as family/name: their revisions count.
    """

    revision: ClassVar[int]
    writes: ClassVar[Literal["model", "classifier", ""]] = ""
    uses: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def problems(config, recipe, stage) -> list[Problem]:
        """Return what the schema cannot check of a stage's keys."""
        return []

    @staticmethod
    def notes(config) -> list[Problem]:
        """Return keys that are allowed and have no effect."""
        return []

    @abstractmethod
    def run(self, ctx) -> Compute:
        """Carry the stage out in its context, write its output, and return what it cost."""
