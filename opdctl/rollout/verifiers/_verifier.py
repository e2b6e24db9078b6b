"""The hooks of every verifier with their defaults, and the base of those that grade one by one."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from opdctl.errors import OpdctlError, Problem
from opdctl.types import Prompt

FENCE = re.compile(r"^```[^\n`]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


class Verifier(ABC):
    """A verifier of a domain's answers; built as ``Verifier(config, ctx, domain)``.

    Attributes:
        revision: part of every fingerprint; raise it when the mathematics changes.
        asks_server: it sends answers to a server; ``require_served`` checks that server.
        extracted: the domain's ``extract`` finds the answer in a response, so that all of what
            the verifier is given is the answer.
    """

    revision: ClassVar[int]
    asks_server: ClassVar[bool] = False
    extracted: bool = False

    def __init__(self, config, ctx, domain: str) -> None:
        self.config, self.ctx, self.domain = config, ctx, domain

    @staticmethod
    def problems(config) -> list[Problem]:
        """Return what the schema cannot check of the verifier's keys."""
        return []

    @staticmethod
    def needs_answer(config) -> bool:
        """Return True if the data must have a reference answer."""
        return True

    @staticmethod
    def item(config, row: dict) -> dict:
        """Return the fields of a table's row that the verifier reads, beside the answer.

        Raises:
            KeyError: the row lacks a column.
            ValueError: a column holds nothing that the verifier can read.
        """
        return {}

    @staticmethod
    def files(config) -> list[str]:
        """Return the files that decide a verdict, for the record of a stage's inputs."""
        return []

    @staticmethod
    def require_served(config, domain: str, check: Callable[[], None]) -> None:
        """Check that the verifier's server answers.

        Raises:
            StageFailed: it does not answer.
        """
        return

    @abstractmethod
    def score(self, answers: list[tuple[Prompt, str]]) -> list[float | Exception]:
        """Return a verdict from 0 to 1 for each (prompt, answer), or the exception in its place."""


class SingleAnswerVerifier(Verifier):
    """A verifier that grades each answer by itself."""

    @abstractmethod
    def grade(self, prompt: Prompt, answer: str) -> float:
        """Return 1 if the answer passes, else 0. Any exception counts as wrong, and is reported."""

    def score(self, answers: list[tuple[Prompt, str]]) -> list[float | Exception]:
        """Return a verdict for each (prompt, answer), or the exception that was raised.

        Raises:
            OpdctlError: nothing can be verified, whatever the answer.
        """
        verdicts: list[float | Exception] = []
        for prompt, answer in answers:
            try:
                verdicts.append(float(self.grade(prompt, answer)))
            except OpdctlError:
                raise
            except Exception as error:  # a verifier may raise anything on an answer
                verdicts.append(error)
        return verdicts


def last_fenced_block(text: str) -> str:
    """Return the last block between lines of three backticks; the whole text if there is none."""
    blocks = FENCE.findall(text)
    return blocks[-1] if blocks else text
