"""The hooks of every engine, with the defaults of those that a member leaves out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from opdctl.errors import Problem


@dataclass
class Sample:
    """A sampled response.

    Attributes:
        ids: its tokens, with the end token if it has one.
        logprobs: the log-prob of each token under the distribution it was sampled from.
        truncated: the response was cut at the limit.
    """

    ids: list[int]
    logprobs: list[float]
    truncated: bool


class Engine(ABC):
    """A sampler of responses; built as ``Engine(model, batch, check, wal)``.

    An engine with weights of its own is built once a stage, with ``settings(runtime)`` as a fifth
    argument, and is told by ``publish`` when the weights change.

    Attributes:
        revision: part of every fingerprint; raise it when the mathematics changes.
        has_own_weights: it keeps a copy of the weights, and so is kept from step to step.
    """

    revision: ClassVar[int]
    has_own_weights: ClassVar[bool] = False

    @staticmethod
    def problems(recipe) -> list[Problem]:
        """Return what this engine cannot do of a recipe."""
        return []

    @staticmethod
    def notes(recipe) -> list[Problem]:
        """Return what this engine can do of a recipe, but with less effect than it seems."""
        return []

    @staticmethod
    def require() -> None:
        """Check that the engine is installed.

        Raises:
            UsageError: it is not.
        """
        return

    @staticmethod
    def settings(runtime) -> Any:
        """Return the engine's own settings of a run's keys."""
        return None

    def switch_model(self, model) -> bool:
        """Sample from another model from now on; return False if this engine cannot."""
        return False

    @abstractmethod
    def publish(self, version: int | str) -> None:
        """Make the model's weights, as they are now, those to sample from.

        Args:
            version: optimizer steps that the weights have seen, or a name for other weights.
        """

    @abstractmethod
    def release(self) -> None:
        """Give memory back to the trainer until the next ``publish``."""

    def close(self) -> None:
        """Shut the engine down."""
        return

    @abstractmethod
    def generate(
        self, prompts: list[list[int]], keys: list[int], *, temperature: float, max_tokens: int
    ) -> list[Sample]:
        """Return one sample for each prompt and key.

        Args:
            prompts: token ids; ragged.
            keys: 64 bits each, which determine the draws.
        """
