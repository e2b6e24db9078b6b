"""Off-policy samples of another model: sequence-level distillation (Kim and Rush 2016).

With ``keep: verified`` only answers that the verifier passes are kept (rejection sampling), which
is how Qwen3 and GLM-5 make cold-start data. Texts are re-encoded with the student's tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opdctl.core.prompts import PromptOrder
from opdctl.core.sampling import sample_group
from opdctl.schema import REQUIRED, key
from opdctl.settings import Sampling


class Teacher:
    """Responses of a frozen model, all of them or the verified ones."""

    revision = 1
    samples_from = "teacher"

    @dataclass(kw_only=True)
    class Config:
        """Keys of a teacher source."""

        model: str = key(REQUIRED, "who samples", ref=True)
        keep: Literal["verified", "all"] = key("verified", "which samples are kept")
        sampling: Sampling = key(Sampling(), "how the teacher samples")

    def __init__(self, config, ctx, model) -> None:
        self.config, self.ctx, self.student = config, ctx, model
        self.model = ctx.frozen(config.model)
        self.order = PromptOrder(ctx)
        self.parameters = self.model.parameters

    def draw(self, step: int):
        """The kept samples of a step; fewer than asked for where the verifier refuses some."""
        rollouts = sample_group(
            self.ctx,
            self.model,
            self.order.at(step),
            step,
            "teacher",
            sampling=self.config.sampling,
        )
        self.sampled = sum(len(r.prompt_ids) + len(r.response_ids) for r in rollouts)
        if self.config.keep == "verified":
            for rollout in rollouts:
                rollout.reward = self.ctx.verify(rollout)
            rollouts = [r for r in rollouts if r.reward == 1.0]
        for rollout in rollouts:
            rollout.behaviour_logprobs = None
            rollout.prompt_ids = self.student.render(rollout.prompt.text)
            ids = self.student.encode(rollout.text)
            rollout.response_ids = ids[:-1] if rollout.truncated else ids
        return rollouts
