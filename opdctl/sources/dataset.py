"""Demonstrations from the data itself: the reference answers, a share of them corrupted.

Corruption stands in for the mistakes of a real corpus. It leaves something for sampling to find
that imitation does not: a model that learns the corpus at temperature 1 makes its mistakes too.
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.core import draws
from opdctl.core.prompts import PromptOrder
from opdctl.schema import key
from opdctl.types import Rollout


class Dataset:
    """The reference answers of the data, a stated share of them corrupted."""

    revision = 1

    @dataclass(kw_only=True)
    class Config:
        """Keys of a dataset source."""

        corrupt: float = key(0.0, "share of answers made wrong by one edit", least=0, most=1)

    def __init__(self, config, ctx, model) -> None:
        self.config, self.model, self.seed = config, model, ctx.seed
        self.order = PromptOrder(ctx)

    def draw(self, step: int):
        """One demonstration per prompt and sample of the step."""
        rollouts = []
        for group, prompt in enumerate(self.order.at(step)):
            for sample in range(self.order.samples):
                answer = prompt.answer
                name = (self.seed, "corrupt", step, group, sample)
                if draws.unit(*name) < self.config.corrupt:
                    answer = corrupted(answer, draws.key(*name, "edit"))
                rollouts.append(
                    Rollout(
                        prompt,
                        self.model.render(prompt.text),
                        self.model.encode(answer),
                        source="dataset",
                        group=group,
                        version=step,
                        text=answer,
                    )
                )
        return rollouts


def corrupted(answer: str, key: int) -> str:
    """One edit that keeps the look of an answer: a character replaced by another of its class.

    A one-character class (punctuation) is left alone; digits become digits, letters letters.
    """
    places = [i for i, c in enumerate(answer) if c.isalnum()]
    if not places:
        return answer + "0"
    place = places[key % len(places)]
    old = answer[place]
    pool = "0123456789" if old.isdigit() else "abcdefghijklmnopqrstuvwxyz"
    choices = [c for c in pool if c != old.lower()]
    new = choices[(key // 1009) % len(choices)]
    return answer[:place] + (new.upper() if old.isupper() else new) + answer[place + 1 :]
