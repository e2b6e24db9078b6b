"""Off-policy samples of another model: sequence-level distillation (Kim and Rush 2016).

With ``keep: verified`` only answers that the verifier passes are kept (rejection sampling), which
is how Qwen3 and GLM-5 make cold-start data. Texts are re-encoded with the student's tokenizer, so
a model behind an API (``http://host:8000``) can be the teacher too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opdctl import references
from opdctl.core.prompts import PromptOrder
from opdctl.core.sampling import sample_group, unanswered
from opdctl.registry import member
from opdctl.schema import REQUIRED, key
from opdctl.settings import Sampling


class Teacher:
    """Responses of a frozen model, all of them or the verified ones."""

    revision = 1
    samples_from = "teacher"

    @dataclass(kw_only=True)
    class Config:
        """Keys of a teacher source."""

        domains: dict[str, bool] = key(
            {}, "domain: true; empty is all, or all no other source has", neutral=True
        )
        model: str = key(REQUIRED, "who samples", ref=True)
        experts: dict[str, str] = key({}, "domain: who samples it instead", ref=True)
        keep: Literal["verified", "all"] = key("verified", "which samples are kept")
        sampling: Sampling = key(Sampling(), "how the teacher samples")

    def __init__(self, config, ctx, model) -> None:
        self.config, self.ctx, self.student = config, ctx, model
        self.order = PromptOrder(ctx, model, config.domains)
        self.parameters, self._apis = 0.0, {}

    def draw(self, step: int):
        """The kept samples of a step; fewer than asked for where the verifier refuses some."""
        by_expert: dict[str, list] = {}
        for prompt in self.order.at(step):
            expert = self.config.experts.get(prompt.domain, self.config.model)
            by_expert.setdefault(expert, []).append(prompt)
        rollouts, flops = [], 0.0
        for expert, prompts in by_expert.items():
            found, parameters = self._sampled(expert, prompts, step)
            first = 1 + max((r.group for r in rollouts), default=-1)
            for rollout in found:
                rollout.group += first
            flops += parameters * sum(r.forwarded for r in found)
            rollouts += found
        self.sampled = sum(r.forwarded for r in rollouts)
        self.parameters = flops / max(1, self.sampled)  # of the mean expert, by tokens
        if self.config.keep == "verified":
            for rollout, right in zip(rollouts, self.ctx.verify(rollouts), strict=True):
                rollout.reward = right
            rollouts = [r for r in rollouts if r.reward == 1.0]
        for rollout in rollouts:
            rollout.behaviour_logprobs = None
            self._retell(rollout)
        return rollouts

    def _sampled(self, expert: str, prompts: list, step: int) -> tuple[list, int]:
        """Its responses, and its parameters: 0 of a model behind an API, which are not known."""
        sampling = self.config.sampling
        if references.parse(expert).form != "server":
            model = self.ctx.frozen(expert)
            found = sample_group(self.ctx, model, prompts, step, "teacher", sampling=sampling)
            return found, model.parameters
        if expert not in self._apis:
            self._apis[expert] = member("teachers", "api")(
                self.ctx, self.student, f"of stages.{self.ctx.name}", expert
            )
        found, keys = unanswered(self.ctx, self.student, prompts, step, "teacher")
        answers = self._apis[expert].answer([r.prompt for r in found], keys, sampling)
        for rollout, (rollout.text, rollout.truncated) in zip(found, answers, strict=True):
            rollout.response_ids = self.student.encode(rollout.text)
        return found, 0

    def _retell(self, rollout) -> None:
        """The same turns in the student's tokens."""
        student, said, spoken = self.student, [], rollout.before[::2]
        rollout.prompt_ids, rollout.observed = student.render(rollout.prompt), ()
        environment = self.ctx.environment(rollout.prompt.domain) if spoken else None
        for text, reply in zip(spoken, rollout.before[1::2], strict=True):
            said += student.encode(text)
            answer = student.observation(reply, environment.role, prompt=rollout.prompt)
            rollout.observed += ((len(said), len(said) + len(answer)),)
            said += answer
        ids = student.encode(rollout.text)
        rollout.response_ids = said + (ids[:-1] if rollout.truncated else ids)
