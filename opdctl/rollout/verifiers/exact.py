"""Equal text, after the normalisation that the keys choose. Leaves out numbers: see math."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.rollout.verifiers._verifier import SingleAnswerVerifier


class Exact(SingleAnswerVerifier):
    """The answer is the reference answer, white space around it aside."""

    revision = 1

    @dataclass(kw_only=True)
    class Config:
        """The keys of an exact comparison."""

        ignore_case: bool = key(False, "A and a are one")
        ignore_space: bool = key(False, "runs of white space are one space")
        nfkc: bool = key(False, "compare Unicode's NFKC forms: full-width digits are digits")
        trim: str = key("", "characters taken off both ends, as in '.!'")

    def grade(self, prompt, answer: str) -> float:
        """Return 1 if answer and reference answer are equal once normalised, else 0."""
        return self.normalise(answer) == self.normalise(prompt.answer)

    def normalise(self, text: str) -> str:
        """Return the text as it is compared."""
        config = self.config
        if config.nfkc:
            text = unicodedata.normalize("NFKC", text)
        if config.ignore_case:
            text = text.casefold()
        if config.ignore_space:
            text = " ".join(text.split())
        return text.strip().strip(config.trim).strip() if config.trim else text.strip()
