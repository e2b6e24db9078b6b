"""Off-policy samples of another model: sequence-level distillation (Kim and Rush 2016).

With ``keep: verified`` only answers that the verifier passes are kept (rejection sampling), which
is how Qwen3 and GLM-5 make cold-start data. Texts are re-encoded with the student's tokenizer, and
told in its chat template (``models/chat/retold.py``), so a model behind an API
(``http://host:8000``) can be the teacher too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opdctl.config import references
from opdctl.config.registry import member
from opdctl.config.schema import REQUIRED, key
from opdctl.config.settings import Sampling
from opdctl.errors import UsageError
from opdctl.models.chat.retold import opening, retold
from opdctl.rollout.prompts import PromptOrder
from opdctl.rollout.sampling import sample_group, unanswered


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
        opened: dict[int, list[str | None]] = {}
        for expert, prompts in by_expert.items():
            found, parameters, before = self._sampled(expert, prompts, step)
            opened |= {id(r): turns for r, turns in zip(found, before, strict=True)}
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
            self._retell(rollout, opened[id(rollout)])
        return rollouts

    def _sampled(self, expert: str, prompts: list, step: int) -> tuple[list, int, list]:
        """Its responses; its parameters, 0 of a model behind an API, which are not known; and of
        each turn of a response what its template opened, None of an API."""
        sampling = self.config.sampling
        if references.parse(expert).form != "server":
            model = self.ctx.frozen(expert)
            found = sample_group(self.ctx, model, prompts, step, "teacher", sampling=sampling)
            return found, model.parameters, [self._opened(model, r) for r in found]
        if expert not in self._apis:
            self._apis[expert] = member("teachers", "api")(
                self.ctx, self.student, f"of stages.{self.ctx.name}", expert
            )
        found, keys = unanswered(self.ctx, self.student, prompts, step, "teacher")
        answers = self._apis[expert].answer([r.prompt for r in found], keys, sampling)
        for rollout, (rollout.text, rollout.truncated) in zip(found, answers, strict=True):
            rollout.response_ids = self.student.encode(rollout.text)
        return found, 0, [[None]] * len(found)

    def _marks(self, rollout):
        return self.ctx.data(rollout.prompt.domain).config.thinking

    def _opened(self, model, rollout) -> list[str]:
        """What stands open of a block of thought before each turn of a response."""
        heard = [rollout.prompt_ids, *(rollout.response_ids[a:b] for a, b in rollout.observed)]
        return [opening(model, ids, self._marks(rollout)) for ids in heard]

    def _retell(self, rollout, before: list[str | None]) -> None:
        """The same turns in the student's tokens, after what its template opens.

        Args:
            before: what the teacher's template opened, of each turn.

        Raises:
            UsageError: the student's template has no place for what the teacher thought.
        """
        student, marks = self.student, self._marks(rollout)
        environment = self.ctx.environment(rollout.prompt.domain) if rollout.before else None
        asked = student.render(rollout.prompt)
        rollout.prompt_ids, rollout.observed = asked, ()
        said, turns, replies = [], [*rollout.before[::2], rollout.text], rollout.before[1::2]
        for turn, text in enumerate(turns):
            cut = rollout.truncated and turn == len(replies)
            try:
                text = retold(text, before[turn], opening(student, asked, marks), marks, cut)
            except UsageError as error:
                domain = rollout.prompt.domain
                raise UsageError(f"data.{domain}: {error.message}", error.hint) from error
            turns[turn] = text
            ids = student.encode(text)
            said += ids[:-1] if cut else ids
            if turn < len(replies):
                asked = student.observation(replies[turn], environment.role, prompt=rollout.prompt)
                rollout.observed += ((len(said), len(said) + len(asked)),)
                said += asked
        told = [t for pair in zip(turns, replies, strict=False) for t in pair]
        rollout.response_ids, rollout.before, rollout.text = said, tuple(told), turns[-1]
