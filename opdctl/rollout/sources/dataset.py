"""Demonstrations from the data itself: thinking, calls and reference answers, some corrupted.

Corruption stands in for the mistakes of a real corpus. It leaves something that sampling can
improve and imitation cannot: a model that learns the corpus at temperature 1 makes its mistakes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from opdctl import draws
from opdctl.config.schema import key
from opdctl.config.settings import SourceConfig
from opdctl.errors import UsageError
from opdctl.models.chat.conversation import render_conversation
from opdctl.models.chat.retemplated import retemplate, thought_opening
from opdctl.rollout.prompts import PromptOrder
from opdctl.rollout.sampling import append_reply
from opdctl.rollout.sources._source import Source
from opdctl.types import Prompt, Rollout


class Dataset(Source):
    """The reference answers of the data, a stated share of them corrupted."""

    revision = 1
    samples_from = "dataset"

    @dataclass(kw_only=True)
    class Config(SourceConfig):
        """The keys of a dataset source."""

        domains: dict[str, bool] = key(
            {}, "domain: true; empty is all, or all no other source has", neutral=True
        )
        corrupt: float = key(0.0, "share of answers made wrong", least=0, most=1)
        turns: Literal["all", "last"] = key(
            "all", "of a conversation: which turns of the assistant are learnt", neutral=True
        )

    def __init__(self, config, ctx, model) -> None:
        self.config, self.ctx, self.model, self.seed = config, ctx, model, ctx.seed
        self.order = PromptOrder(ctx, model, config.domains)
        self.environments = {d: ctx.prompts.environment(d) for d in self.order.pools}

    def draw(self, step: int):
        """Return one demonstration per prompt and sample of the step."""
        rollouts = []
        for group, prompt in enumerate(self.order.at(step)):
            for sample in range(self.order.samples):
                lead, answer = prompt.lead, prompt.answer
                name = (self.seed, "corrupt", step, group, sample)
                if draws.unit(*name) < self.config.corrupt:
                    lead, answer = corrupt_answer(prompt, self.order.pools[prompt.domain], *name)
                if prompt.messages and prompt.messages[-1]["role"] == "assistant":
                    rollouts.append(self._conversation(prompt, group, step))
                    continue
                rollout = Rollout(
                    prompt,
                    self.model.render(prompt),
                    [],
                    source="dataset",
                    group=group,
                    version=step,
                )
                opening = self.model.opening(prompt)
                for turn, call in enumerate(prompt.calls):
                    self._append(rollout, call, opening)
                    environment = self.environments[prompt.domain]
                    replied = append_reply(rollout, turn, self.environments, self.model)
                    if not replied or rollout.before[-1] == environment.refusal:
                        raise UsageError(
                            f"data.{prompt.domain}.call: the environment does not answer {call!r}",
                            "write a call as its environment reads it",
                        )
                    reply, role = rollout.before[-1], environment.role
                    opening = self.model.between(reply, role, prompt=prompt)
                if not self.ctx.prompts.data(prompt.domain).config.thinking.follows_mode(
                    lead + answer
                ):
                    raise UsageError(
                        f"data.{prompt.domain}: a demonstration without the thinking it asks for",
                        "a trace, a thought_column, or a teacher as the source",
                    )
                self._append(rollout, self._after_prompt(prompt, lead, answer), opening)
                rollouts.append(rollout)
        return rollouts

    def _conversation(self, prompt: Prompt, group: int, step: int) -> Rollout:
        """Return a conversation as a rollout of the assistant's turns; others are context."""
        thinking = self.ctx.prompts.data(prompt.domain).config.thinking
        if self.config.corrupt:
            raise UsageError(
                f"data.{prompt.domain}: a conversation has no answer that could be corrupted",
                "sources.dataset.corrupt=0",
            )
        try:
            rendered = render_conversation(self.model, prompt, self.config.turns == "all", thinking)
        except UsageError as error:
            where = f"data.{prompt.domain}, the conversation of {prompt.text[:40]!r}"
            raise UsageError(f"{where}: {error.message}", error.hint) from error
        first, end = rendered.spans[0][0], rendered.spans[-1][1]
        gaps = [(a[1] - first, b[0] - first) for a, b in pairwise(rendered.spans)]
        written = [self.model.decode(rendered.ids[a:b]) for a, b in rendered.spans]
        between = [self.model.tokenizer.decode(rendered.ids[first:][a:b]) for a, b in gaps]
        before = [text for turns in zip(written, between, strict=False) for text in turns]
        if thinking.mode != "free" and not thinking.follows_mode(written[-1]):
            raise UsageError(
                f"data.{prompt.domain}: a conversation without the thinking it asks for",
                "thinking.mode=free, or conversations that show it",
            )
        return Rollout(
            prompt,
            rendered.ids[:first],
            rendered.ids[first:end],
            source="dataset",
            group=group,
            version=step,
            text=written[-1],
            before=tuple(before),
            observed=tuple(gaps),
        )

    def _after_prompt(self, prompt: Prompt, lead: str, answer: str) -> str:
        """Return a demonstration without the marks of thinking that its prompt ends in.

        Raises:
            UsageError: the prompt ends in a closed block, and the demonstration thinks.
        """
        thinking = self.ctx.prompts.data(prompt.domain).config.thinking
        text = lead + answer
        if prompt.calls:
            return text
        if thinking.mode != "free":
            after = self.model.after_prompt(prompt, lead, thinking.open, thinking.close)
            return after + answer
        if not text.lstrip().startswith(thinking.open.strip() or thinking.open):
            return text
        written = thought_opening(self.model, self.model.render(prompt), thinking)
        try:
            return retemplate(text, "", written, thinking)
        except UsageError as error:
            raise UsageError(f"data.{prompt.domain}: {error.message}", error.hint) from error

    def _append(self, rollout: Rollout, text: str, opening: str) -> None:
        try:
            ids = self.model.encode(text, opening)
        except UsageError as error:
            raise UsageError(
                f"data.{rollout.prompt.domain}: {error.message}", error.hint
            ) from error
        rollout.response_ids = [*rollout.response_ids, *ids]
        rollout.text = text


def corrupt_answer(prompt: Prompt, pool: Sequence[Prompt], *name: object) -> tuple[str, str]:
    """Return (lead, answer) with a wrong answer that looks like one of its domain.

    Half the time it is another prompt's answer with its thinking; half the time the right thinking
    and the answer with one character replaced by a character of another prompt's answer.

    Args:
        pool: the domain's prompts.
        name: the name of the draws.
    """
    answer = prompt.answer
    for trial in range(20):
        other = pool[draws.key(*name, trial, "other") % len(pool)]
        lead, changed = other.lead, other.answer
        if answer and other.answer and draws.unit(*name, trial, "edit") < 0.5:
            place = draws.key(*name, trial, "place") % len(answer)
            character = other.answer[draws.key(*name, trial, "character") % len(other.answer)]
            lead, changed = prompt.lead, answer[:place] + character + answer[place + 1 :]
        if changed != answer:
            return lead, changed
    return prompt.lead, answer + (answer[-1:] or "0")  # a domain with one answer only
