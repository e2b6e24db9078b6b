"""Off-policy samples of another model: sequence-level distillation (Kim and Rush 2016).

With ``keep: verified`` only answers that the verifier passes are kept (rejection sampling), as
Qwen3 and GLM-5 make cold-start data. Texts are re-encoded with the student's tokenizer and adapted
to its chat template (``models/chat/retemplated.py``), so a model behind an API
(``http://host:8000``) can be the teacher too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opdctl.config import references
from opdctl.config.registry import member
from opdctl.config.schema import REQUIRED, key
from opdctl.config.settings import Sampling, SourceConfig
from opdctl.errors import UsageError
from opdctl.models.chat.retemplated import retemplate, thought_opening
from opdctl.rollout.prompts import PromptOrder
from opdctl.rollout.sampling import empty_rollouts, sample_group
from opdctl.rollout.sources._source import Source


class Teacher(Source):
    """Responses of a frozen model, all of them or the verified ones."""

    revision = 1
    samples_from = "teacher"

    @dataclass(kw_only=True)
    class Config(SourceConfig):
        """The keys of a teacher source."""

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
        """Return the kept samples of a step; fewer than sampled if the verifier refuses some."""
        by_expert: dict[str, list] = {}
        for prompt in self.order.at(step):
            expert = self.config.experts.get(prompt.domain, self.config.model)
            by_expert.setdefault(expert, []).append(prompt)
        rollouts, flops = [], 0.0
        openings: dict[int, list[str | None]] = {}
        for expert, prompts in by_expert.items():
            samples, parameters, before = self._sample(expert, prompts, step)
            openings |= {id(r): turns for r, turns in zip(samples, before, strict=True)}
            first = 1 + max((r.group for r in rollouts), default=-1)
            for rollout in samples:
                rollout.group += first
            flops += parameters * sum(r.forwarded for r in samples)
            rollouts += samples
        self.sampled = sum(r.forwarded for r in rollouts)
        self.parameters = flops / max(1, self.sampled)  # of the mean expert, by tokens
        if self.config.keep == "verified":
            for rollout, right in zip(rollouts, self.ctx.verdicts.verify(rollouts), strict=True):
                rollout.reward = right
            rollouts = [r for r in rollouts if r.reward == 1.0]
        for rollout in rollouts:
            rollout.behaviour_logprobs = None
            self._retemplate(rollout, openings[id(rollout)])
        return rollouts

    def _sample(self, expert: str, prompts: list, step: int) -> tuple[list, int, list]:
        """Sample one expert's responses to some prompts.

        Returns:
            The rollouts; the expert's parameters, 0 for a model behind an API; and for each rollout
            the thought opening before each of its turns, None for an API.
        """
        sampling = self.config.sampling
        if references.parse(expert).form != "server":
            model = self.ctx.models.frozen(expert)
            rollouts = sample_group(self.ctx, model, prompts, step, "teacher", sampling=sampling)
            return rollouts, model.parameters, [self._openings(model, r) for r in rollouts]
        if expert not in self._apis:
            self._apis[expert] = member("teachers", "api")(
                self.ctx, self.student, f"of stages.{self.ctx.name}", expert
            )
        rollouts, keys = empty_rollouts(self.ctx, self.student, prompts, step, "teacher")
        answers = self._apis[expert].answer([r.prompt for r in rollouts], keys, sampling)
        for rollout, (rollout.text, rollout.truncated) in zip(rollouts, answers, strict=True):
            opening = self.student.opening(rollout.prompt)
            rollout.response_ids = self.student.encode(rollout.text, opening, sampled=True)
        return rollouts, 0, [[None]] * len(rollouts)

    def _marks(self, rollout):
        return self.ctx.prompts.data(rollout.prompt.domain).config.thinking

    def _openings(self, model, rollout) -> list[str]:
        """Return the thought opening that the template wrote before each turn of a response."""
        contexts = [rollout.prompt_ids, *(rollout.response_ids[a:b] for a, b in rollout.observed)]
        return [thought_opening(model, ids, self._marks(rollout)) for ids in contexts]

    def _retemplate(self, rollout, before: list[str | None]) -> None:
        """Rewrite a rollout in the student's tokens and chat template, turn by turn.

        Args:
            before: the thought opening of the teacher's template before each turn.

        Raises:
            UsageError: the student's template has no place for the teacher's thought.
        """
        student, marks = self.student, self._marks(rollout)
        domain = rollout.prompt.domain
        environment = self.ctx.prompts.environment(domain)
        context = student.render(rollout.prompt)  # the ids before a turn, and the end of their text
        said = student.opening(rollout.prompt)
        rollout.prompt_ids, rollout.observed = context, ()
        response, turns, replies = [], [*rollout.before[::2], rollout.text], rollout.before[1::2]
        for turn, text in enumerate(turns):
            cut = rollout.truncated and turn == len(replies)
            try:
                text = retemplate(
                    text, before[turn], thought_opening(student, context, marks), marks, cut
                )
            except UsageError as error:
                raise UsageError(f"data.{domain}: {error.message}", error.hint) from error
            turns[turn] = text
            decoded = before[turn] is not None  # else it is the text of an API
            response += student.encode(text, said, sampled=True, cut=cut, decoded=decoded)
            if turn < len(replies):
                reply, role = replies[turn], environment.role
                context = student.observation(reply, role, prompt=rollout.prompt)
                said = student.between(reply, role, prompt=rollout.prompt)
                rollout.observed += ((len(response), len(response) + len(context)),)
                response += context
        earlier = tuple(text for both in zip(turns, replies, strict=False) for text in both)
        rollout.response_ids, rollout.before, rollout.text = response, earlier, turns[-1]
