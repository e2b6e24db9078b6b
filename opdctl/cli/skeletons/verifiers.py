"""The verdict of skeleton: an answer is right if its end is the reference answer.

members: ./my_members
data: {mine: {kind: jsonl, path: mine.jsonl, verifier: {skeleton: {}}}}
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.rollout.verifiers._verifier import SingleAnswerVerifier


class Skeleton(SingleAnswerVerifier):
    """The answer ends in the reference answer."""

    revision = 1

    @dataclass(kw_only=True)
    class Config:
        """The keys of skeleton."""

        ignore_case: bool = key(False, "A and a are one")

    def grade(self, prompt, answer: str) -> float:
        """Return 1 if the answer passes, 0 if not. What it raises counts as wrong."""
        texts = [answer.strip(), prompt.answer.strip()]
        if self.config.ignore_case:
            texts = [text.casefold() for text in texts]
        return float(texts[0].endswith(texts[1]))
