"""The prompts of skeleton: sums of two numbers, with the verifier that they bring.

members: ./my_members
data: {sums: {kind: skeleton, largest: 9}}
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.rollout.data._domain_data import DomainData
from opdctl.rollout.split import DomainKeys, Split, distinct_prompts, question_id
from opdctl.types import Prompt


class Skeleton(DomainData):
    """Sums of two numbers."""

    revision = 1
    procedural = True  # prompts are generated, and answers verified by score

    @dataclass(kw_only=True)
    class Config(DomainKeys):
        """The keys of skeleton."""

        largest: int = key(20, "largest number that is added", least=1)
        eval_share: float = key(0.25, "share of questions held out", least=0, most=1)

    def __init__(self, config: Config, domain: str, seed: int) -> None:
        self.config, self.domain = config, domain

    def prompts(self, split: Split) -> list[Prompt]:
        """Return the distinct prompts of one side of the split."""
        numbers = range(self.config.largest + 1)
        questions = (self._prompt(a, b) for a in numbers for b in numbers)
        return distinct_prompts(questions, split, self.config)

    def _prompt(self, a: int, b: int) -> Prompt:
        text = f"{a}+{b}="
        return Prompt(question_id(self.domain, text), self.domain, text, str(a + b), {})

    def score(self, prompt: Prompt, text: str) -> float:
        """Return 1 if the answer, without its thinking, is right, else 0."""
        return float(self.config.thinking.split(text)[1].strip() == prompt.answer)
