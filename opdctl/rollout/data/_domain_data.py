"""The hooks of every data kind, with the defaults of those that a member leaves out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from opdctl.errors import Problem
from opdctl.rollout.split import Split
from opdctl.types import Prompt


class DomainData(ABC):
    """The data of a domain; built as ``DomainData(config, domain, seed)``.

    Attributes:
        revision: part of every fingerprint; raise it when the mathematics changes.
        procedural: prompts are generated, and the data verifies answers itself: ``score``.
        public: rows come from outside, where they may change between two reads.
    """

    revision: ClassVar[int]
    procedural: ClassVar[bool] = False
    public: bool = False

    @staticmethod
    def problems(config) -> list[Problem]:
        """Return what the schema cannot check of the domain's keys."""
        return []

    @abstractmethod
    def prompts(self, split: Split) -> list[Prompt]:
        """Return the distinct prompts of one side of the split."""
