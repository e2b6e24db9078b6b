"""What verifiers share: one answer at a time with its failure kept, and fenced blocks."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod

from opdctl.errors import OpdctlError
from opdctl.types import Prompt

FENCE = re.compile(r"^```[^\n`]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


class OneByOne(ABC):
    """A verifier that reads each answer by itself."""

    needs_answer = True  # whether the data must have a reference answer

    def __init__(self, config, ctx, domain: str) -> None:
        self.config, self.ctx, self.domain = config, ctx, domain

    @abstractmethod
    def right(self, prompt: Prompt, answer: str) -> float:
        """1 if the answer passes, 0 if not. What it raises counts as wrong, and is reported."""

    def score(self, asked: list[tuple[Prompt, str]]) -> list[float | Exception]:
        """A verdict for each (prompt, answer), or what was raised in its place.

        Raises:
            OpdctlError: nothing could be verified, whatever the answer.
        """
        found: list[float | Exception] = []
        for prompt, answer in asked:
            try:
                found.append(float(self.right(prompt, answer)))
            except OpdctlError:
                raise
            except Exception as error:  # a verifier may raise anything on an answer
                found.append(error)
        return found


def fenced(text: str) -> str:
    """The last block between lines of three backticks; all of a text without one."""
    blocks = FENCE.findall(text)
    return blocks[-1] if blocks else text
