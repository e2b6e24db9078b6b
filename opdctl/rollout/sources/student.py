"""On-policy rollouts: the student samples from its current weights."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.settings import SourceConfig
from opdctl.rollout.prompts import PromptOrder
from opdctl.rollout.sampling import sample_group
from opdctl.rollout.sources._source import Source


class Student(Source):
    """Responses of the model being trained, at its current weights."""

    revision = 1
    samples_from = "student"
    has_logprobs = True
    in_opd = True

    @dataclass(kw_only=True)
    class Config(SourceConfig):
        """The keys, of which there are none: see the stage's ``prompts`` and ``sampling``."""

    @staticmethod
    def student_share(config) -> float:
        """Return 1: the student samples all rollouts."""
        return 1.0

    def __init__(self, config, ctx, model) -> None:
        self.ctx, self.model = ctx, model
        self.order = PromptOrder(ctx, model)
        self.parameters = model.parameters

    def draw(self, step: int):
        """Return all rollouts of a step: ``per_step`` prompts x ``samples``."""
        rollouts = sample_group(self.ctx, self.model, self.order.at(step), step, "student")
        self.sampled = sum(r.forwarded for r in rollouts)
        return rollouts
