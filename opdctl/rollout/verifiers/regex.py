"""A pattern finds the answer in a response, or decides by itself.

With the library ``regex``, whose searches take a timeout: a pattern that backtracks without end on
what a model wrote must not hold up a stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opdctl.config.schema import REQUIRED, key
from opdctl.errors import Problem
from opdctl.rollout.verifiers._answers import OneByOne


class Regex(OneByOne):
    """A match whose group ``answer`` is the reference answer; without that group, any match."""

    revision = 1

    @dataclass(kw_only=True)
    class Config:
        """Keys of a pattern."""

        pattern: str = key(REQUIRED, "regular expression, as in 'answer: (?P<answer>\\d+)'")
        match: Literal["last", "first", "whole"] = key(
            "last", "which match counts; whole: the pattern has to match all of the answer"
        )
        ignore_case: bool = key(False, "in the pattern, and in the comparison")
        timeout: float = key(1.0, "seconds of one search", least=0.01)

    @staticmethod
    def problems(config) -> list[Problem]:
        """What the schema cannot see."""
        import regex

        try:
            regex.compile(config.pattern)
        except regex.error as error:
            return [Problem("pattern", f"not a regular expression: {error}", "quote it in YAML")]
        return []

    def __init__(self, config, ctx, domain: str) -> None:
        import regex

        super().__init__(config, ctx, domain)
        self.pattern = regex.compile(config.pattern, regex.IGNORECASE if config.ignore_case else 0)

    def right(self, prompt, answer: str) -> float:
        """Whether the chosen match has the reference answer in its group.

        Raises:
            TimeoutError: the search took too long.
        """
        limit, answer = self.config.timeout, answer.strip()
        if self.config.match == "whole":
            found = self.pattern.fullmatch(answer, timeout=limit)
        elif self.config.match == "first":
            found = self.pattern.search(answer, timeout=limit)
        else:
            found = None
            for found in self.pattern.finditer(answer, timeout=limit):  # noqa: B007
                pass
        if found is None or "answer" not in self.pattern.groupindex:
            return found is not None
        ours, theirs = (found["answer"] or "").strip(), prompt.answer.strip()
        return ours.casefold() == theirs.casefold() if self.config.ignore_case else ours == theirs
