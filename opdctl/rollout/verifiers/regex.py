"""Answers graded by a pattern, which finds the answer in a response or decides by itself.

It uses the library ``regex``, whose searches take a timeout: a pattern that backtracks without end
on a model's text must not hold up a stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opdctl.config.schema import REQUIRED, key
from opdctl.errors import Problem
from opdctl.rollout.verifiers._verifier import SingleAnswerVerifier


class Regex(SingleAnswerVerifier):
    """A match whose group ``answer`` is the reference answer; without that group, any match."""

    revision = 1

    @dataclass(kw_only=True)
    class Config:
        """The keys of a pattern."""

        pattern: str = key(REQUIRED, "regular expression, as in 'answer: (?P<answer>\\d+)'")
        match: Literal["last", "first", "whole"] = key(
            "last", "which match counts; whole: the pattern has to match all of the answer"
        )
        ignore_case: bool = key(False, "in the pattern, and in the comparison")
        timeout: float = key(1.0, "seconds of one search", least=0.01)

    @staticmethod
    def needs_answer(config) -> bool:
        """Return True if the pattern has the group ``answer``; without it a match is enough."""
        import regex

        try:
            return "answer" in regex.compile(config.pattern).groupindex
        except regex.error:
            return False  # said by problems

    @staticmethod
    def problems(config) -> list[Problem]:
        """Return what the schema cannot check of the keys."""
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

    def grade(self, prompt, answer: str) -> float:
        """Return 1 if the match that counts has the reference answer in its group, else 0.

        Raises:
            TimeoutError: the search took too long.
        """
        limit, answer = self.config.timeout, answer.strip()
        if self.config.match == "whole":
            match = self.pattern.fullmatch(answer, timeout=limit)
        elif self.config.match == "first":
            match = self.pattern.search(answer, timeout=limit)
        else:
            match = None
            for match in self.pattern.finditer(answer, timeout=limit):  # noqa: B007
                pass
        if match is None or "answer" not in self.pattern.groupindex:
            return match is not None
        ours, theirs = (match["answer"] or "").strip(), prompt.answer.strip()
        return ours.casefold() == theirs.casefold() if self.config.ignore_case else ours == theirs
