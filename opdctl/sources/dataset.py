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
    samples_from, parameters, sampled = "dataset", 0, 0

    @dataclass(kw_only=True)
    class Config:
        """Keys of a dataset source."""

        corrupt: float = key(0.0, "share of answers made wrong", least=0, most=1)

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
                    answer = corrupted(answer, self.order.pools[prompt.domain], *name)
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


def corrupted(answer: str, pool: list, *name: object) -> str:
    """A wrong answer that looks like an answer of its domain; never the right one.

    Half the time another prompt's answer, half the time one character replaced by a character of
    another prompt's answer.

    Args:
        pool: the domain's prompts.
        name: what the draws are named after.
    """
    for trial in range(20):
        other = pool[draws.key(*name, trial, "other") % len(pool)].answer
        changed = other
        if answer and other and draws.unit(*name, trial, "edit") < 0.5:
            place = draws.key(*name, trial, "place") % len(answer)
            character = other[draws.key(*name, trial, "character") % len(other)]
            changed = answer[:place] + character + answer[place + 1 :]
        if changed != answer:
            return changed
    return answer + (answer[-1:] or "0")  # a domain with one answer only
