"""Equal text, after the levelling that the keys ask for. Leaves out numbers: see math."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.rollout.verifiers._answers import OneByOne


class Exact(OneByOne):
    """The answer is the reference answer, white space around it aside."""

    revision = 1

    @dataclass(kw_only=True)
    class Config:
        """Keys of an exact comparison."""

        ignore_case: bool = key(False, "A and a are one")
        ignore_space: bool = key(False, "runs of white space are one space")
        nfkc: bool = key(False, "compare Unicode's NFKC forms: full-width digits are digits")
        trim: str = key("", "characters taken off both ends, as in '.!'")

    def right(self, prompt, answer: str) -> float:
        """Whether both are one text."""
        return self.levelled(answer) == self.levelled(prompt.answer)

    def levelled(self, text: str) -> str:
        """The text as it is compared."""
        config = self.config
        if config.nfkc:
            text = unicodedata.normalize("NFKC", text)
        if config.ignore_case:
            text = text.casefold()
        if config.ignore_space:
            text = " ".join(text.split())
        return text.strip().strip(config.trim).strip() if config.trim else text.strip()
