"""Prompts, answers and an environment's turns as token ids, through a model's chat template.

A response may end with any of several tokens: those of the model's generation config, the
tokenizer's end token, and the token with which the template ends an assistant's turn. A
demonstration ends with the last of these. Every rendering is checked for text that the template
must not drop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from opdctl.errors import UsageError
from opdctl.models.chat.arguments import readable
from opdctl.models.chat.control_tokens import unguarded
from opdctl.models.chat.ends import end_ids
from opdctl.models.chat.heard import require_shown
from opdctl.models.chat.messages import Message, question
from opdctl.models.chat.readable import dropped_characters
from opdctl.models.chat.recent_cache import RecentCache
from opdctl.models.chat.templating import PLACEHOLDER, Templating
from opdctl.models.chat.turn_frame import TurnFrame, frame_of
from opdctl.types import Prompt


class Chat(Templating):
    """The rendering half of a model, which has ``tokenizer``, ``name`` and ``rows``.

    Attributes:
        eos: the tokenizer's end token.
        end_of_turn: the token that ends a demonstration: the template's own, else ``eos``.
        ends: every token that ends a response.
        pad: the token that fills a rectangle.
        rows: rows of the model's embedding; every id is below this number.
    """

    def begin_chat(self, generation: Any) -> None:
        """Find the end tokens.

        Args:
            generation: the model's generation config, or its config: has ``eos_token_id``.

        Raises:
            UsageError: the tokenizer has no end token.
        """
        self.generation = generation
        self.forget_template()
        self.rendered: RecentCache = RecentCache()  # ids by prompt
        self.openings: RecentCache = RecentCache()  # the ends of rendered prompts, by prompt
        self.answers: RecentCache = RecentCache()  # ids by what an environment said
        self.readable: RecentCache = RecentCache()  # texts
        token = self.tokenizer.eos_token_id
        if token is None:
            hint = "name one as eos_token in tokenizer_config.json: a response has to end"
            raise UsageError(f"{self.name}: its tokenizer has no end token", hint)
        stops = [i for i in end_ids(generation) if 0 <= i < self.rows]  # others are never sampled
        self.eos: int = token
        self.end_of_turn: int = self._end_of_turn(stops)
        self.ends: tuple[int, ...] = tuple(dict.fromkeys((self.end_of_turn, self.eos, *stops)))
        pad = self.tokenizer.pad_token_id
        self.pad: int = token if pad is None else pad
        for ids, name in (([self.eos], "its end token"), ([self.pad], "padding")):
            self.require_embedded(ids, name)

    def take_template(self, template: Any, whose: str) -> None:
        """Use another model's chat template from now on; it is saved with this model too.

        Args:
            template: a tokenizer's chat template; None if it has none.
            whose: the name of that model.

        Raises:
            UsageError: it has none.
        """
        if not template:
            hint = "a model that was trained on a template: the teacher, or its base"
            raise UsageError(f"{whose} has no chat template to take", hint)
        if template != self.tokenizer.chat_template:
            self.tokenizer.chat_template = template
            self.begin_chat(self.generation)

    def write_ends(self, generation: Any) -> None:
        """Write the end tokens into the generation config: other programs stop there too."""
        if generation is not None and not set(self.ends) <= set(end_ids(generation)):
            generation.eos_token_id = list(self.ends) if len(self.ends) > 1 else self.eos

    def _end_of_turn(self, stops: list[int]) -> int:
        """Return the token after an assistant's content, if it is a special one.

        If the last turn has none (GLM): the first token of the next turn, if it is among ``stops``.
        If there is no such token either: the tokenizer's end token.
        """
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": PLACEHOLDER}]
        special = set(self.tokenizer.all_special_ids)
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        special |= {i for i, added_token in added.items() if added_token.special}
        for more, allowed in (([], special), ([turns[0]], set(stops))):
            try:
                after = self.probe([*turns, *more]).rpartition(PLACEHOLDER)[2]
            except UsageError:
                break
            after = after if more else after.lstrip()  # white space before the end is said too
            ids = self.tokenizer(after, add_special_tokens=False)["input_ids"]
            if ids and ids[0] in allowed:
                return ids[0]
        return self.eos

    def render(self, prompt: Prompt | str) -> list[int]:
        """Return the ids of a prompt, up to the start of the response.

        Args:
            prompt: a prompt, or the text of a single user turn.

        Raises:
            UsageError: the template drops a turn, ignores enable_thinking, or begins twice.
        """
        key = prompt if isinstance(prompt, str) else (prompt.domain, prompt.id, prompt.text)
        if key not in self.rendered:
            return self.rendered.keep(key, self._render(prompt)[0])
        return self.rendered[key]

    def opening(self, prompt: Prompt | str) -> str:
        """Return the end of a rendered prompt, guarded: what the ids of a response depend on.

        It begins at the last control token; without one it is all of the prompt.
        """
        key = prompt if isinstance(prompt, str) else (prompt.domain, prompt.id, prompt.text)
        if key not in self.openings:
            return self.openings.keep(key, self._render(prompt)[1])
        return self.openings[key]

    def prompt_length(self, prompt: Prompt) -> int:
        """Return the number of tokens of a rendered prompt, without caching it."""
        return len(self._render(prompt)[0])

    def _render(self, prompt: Prompt | str) -> tuple[list[int], str]:
        """Return the ids of a prompt, and the end of its text from its last control token on."""
        if isinstance(prompt, str):
            prompt = Prompt("", "", prompt, "", {})
        turns = question(self.turns(prompt))
        for message in turns:
            self.require_readable(message.get("content") or "")
        plain = len(turns) == 1 and not prompt.tools and prompt.enable_thinking is None
        if plain and not self.tokenizer.chat_template:
            return self._without_template(prompt.text)
        turns, prompt = self.guarded(turns, prompt)
        turns = readable(
            lambda m, t: self.apply(m, replace(prompt, tools=tuple(t)), generate=True),
            turns,
            prompt.tools,
        )
        text = self.apply(turns, prompt, generate=True)
        self._require_rendered(turns, prompt, text)
        if prompt.messages or prompt.tools:
            require_shown(self, turns, prompt, text)
        ids, begin = self.ids(text), self.tokenizer.bos_token_id
        if begin is not None and ids[:2] == [begin, begin]:
            raise UsageError(
                f"{self.name}: a rendered prompt begins by {self.tokenizer.bos_token!r} twice",
                "its chat template writes it twice: mend chat_template.jinja",
            )
        return ids, self.encoder.tail(text)

    def _without_template(self, text: str) -> tuple[list[int], str]:
        """Return the ids of a text that is a prompt as it stands, and its end.

        What the tokenizer's post-processor adds before it stays; an end token after it does not:
        the model would answer after the end.
        """
        self.control.require_unmarked(text)
        text = self.control.question(text)
        probed = self.tokenizer("x", return_special_tokens_mask=True)
        ids, mask = list(probed["input_ids"]), list(probed["special_tokens_mask"])
        body = [i for i, added in enumerate(mask) if not added] or [len(ids)]
        ends = {*self.ends, self.tokenizer.sep_token_id}
        begin = [i for i in ids[: body[0]] if i == self.tokenizer.bos_token_id or i not in ends]
        after = []
        for added in ids[body[-1] + 1 :]:
            if added in ends:
                break
            after.append(added)
        written = self.require_embedded([*begin, *self.encoder.ids(text), *after], text)
        end = "".join(self.tokenizer.convert_ids_to_tokens(after))
        bos = self.tokenizer.bos_token_id
        return written or [self.eos if bos is None else bos], self.encoder.tail(text + end)

    def turns(self, prompt: Prompt) -> tuple[Message, ...]:
        """Return a prompt's conversation, with the domain's system turn first if it has none."""
        turns = tuple(prompt.messages) or ({"role": "user", "content": prompt.text},)
        if prompt.system and turns[0]["role"] not in ("system", "developer"):
            turns = ({"role": "system", "content": prompt.system}, *turns)
        return turns

    def _require_rendered(self, turns: Sequence[Message], prompt: Prompt, text: str) -> None:
        last = [m for m in turns if m["role"] == "user"][-1:]
        for message in [*(m for m in turns if m["role"] in ("system", "developer")), *last]:
            shown = self.control.message(message)["content"] or ""
            if shown.strip() not in text:
                turn = "question" if message["role"] == "user" else f"{message['role']} turn"
                raise UsageError(
                    f"{self.name}: its chat template leaves the {turn} out: "
                    f"{unguarded(shown)[:40]!r}",
                    "mend chat_template.jinja, or use a model whose template has a place for it",
                )
        if prompt.enable_thinking is not None and not self.reads_thinking:
            raise UsageError(
                f"{self.name}: its chat template does not read enable_thinking "
                f"(data.{prompt.domain}.thinking.switch)",
                "thinking.switch=false, and a thinking.tag that its questions carry",
            )

    def after_prompt(self, prompt: Prompt, text: str, opened: str, closed: str) -> str:
        """Remove from a demonstration the marks of thinking that its rendered prompt ends in.

        Some templates open the block of thought, or write an empty one, at the end of the prompt.
        """
        tail = self.tokenizer.decode(self.render(prompt)[-16:]).rstrip()
        if tail.endswith(closed.strip()):
            bare = text.removeprefix(opened)
            return bare.removeprefix(closed) if bare.startswith(closed) else text
        return text.removeprefix(opened) if tail.endswith(opened.strip()) else text

    def observation(
        self, text: str, role: str, end: int | None = None, prompt: Prompt | None = None
    ) -> list[int]:
        """Return the ids between two turns of the model, with an environment's answer in them.

        Args:
            text: the environment's answer.
            role: the role of its turn.
            end: the token that ended the model's turn; None is the template's own.
            prompt: gives ``enable_thinking``.

        Raises:
            UsageError: the tokenizer's chat template has no place for it.
        """
        end = self.end_of_turn if end is None else end
        key = (text, role, end, prompt and prompt.enable_thinking)
        if key not in self.answers:
            self.require_readable(text)
            mark = self.tokenizer.convert_ids_to_tokens(end)
            after = self.between(text, role, end, prompt)
            return self.answers.keep(key, self.ids(after, mark))
        return self.answers[key]

    def between(
        self, text: str, role: str, end: int | None = None, prompt: Prompt | None = None
    ) -> str:
        """Return the guarded text of ``observation``: what goes on from the end token."""
        end = self.end_of_turn if end is None else end
        self.control.require_unmarked(text)
        turns = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": PLACEHOLDER},
            {"role": role, "content": text},
        ]
        try:
            _, content, after = self.apply(turns, prompt, generate=True).rpartition(PLACEHOLDER)
        except UsageError as error:
            raise UsageError(
                f"{self.name}: no place for a turn of role {role}; {error.message}",
                "another role of the environment: role=user",
            ) from error
        if not content or self.control.message(turns[2])["content"] not in after:
            raise UsageError(
                f"{self.name}: its chat template does not show a turn and the answer to it",
                "use a model with a chat template of several turns",
            )
        # the model has written its end token; if the template ends a turn by another, that stays
        mark, rest = self.tokenizer.convert_ids_to_tokens(end), after.lstrip()
        return rest.removeprefix(mark) if rest.startswith(mark) else after

    def encode(
        self,
        answer: str,
        after: str | None = None,
        *,
        sampled: bool = False,
        cut: bool = False,
        decoded: bool = False,
    ) -> list[int]:
        """Return the ids of a response, with the token that ends a turn.

        Args:
            after: the text that it goes on from, of ``opening`` or ``between``; None is the header
                of any response.
            sampled: a model wrote the answer; see ``ids``.
            cut: it was cut at a limit: no end.
            decoded: its control tokens are the text of tokens that were sampled, and are tokens.

        Raises:
            UsageError: the tokenizer joins the end of that text and the beginning of the answer.
        """
        self.require_readable(answer)
        self.control.require_unmarked(answer)
        after = self.header if after is None else after
        content = answer if decoded else self.control.guard(answer, spoken=True)
        text = self.frame.around(content, sampled, cut)
        apart = sampled or not self.tokenizer.chat_template
        return [*self.ids(text, after, apart), *([] if cut else [self.end_of_turn])]

    @cached_property
    def frame(self) -> TurnFrame:
        """The white space that the template writes around a response."""
        return frame_of(self.probe, self.tokenizer.convert_ids_to_tokens(self.end_of_turn))

    @cached_property
    def header(self) -> str:
        """The end of any rendered prompt; without a template a line's end."""
        try:
            return self.encoder.tail(self.probe([{"role": "user", "content": "x"}], True))
        except UsageError:
            return "\n"

    @cached_property
    def signs_spaces(self) -> bool:
        """A flag: words begin by a sign for the space, as SentencePiece's do.

        Decoding drops that of the first token, as if a text always began there.
        """
        first = self.tokenizer.convert_ids_to_tokens(self.apart(" x")[:1])
        return bool(first) and first[0].startswith("\u2581")

    @cached_property
    def begins_by_space(self) -> bool:
        """A flag: the tokenizer puts a space before each response, which the text has not."""
        return self.adds_space and any(map(self.header.endswith, self.control.ids))

    def decode(self, ids: list[int]) -> str:
        """Return the text of a response without its end token.

        Other special tokens stay: a verifier must not be shown a cleaner answer than was sampled.
        """
        body = ids[:-1] if ids and ids[-1] in self.ends else ids
        if not self.signs_spaces:
            return self.tokenizer.decode(body, skip_special_tokens=False)
        mark = self.tokenizer.decode([self.eos], skip_special_tokens=False)
        whole = self.tokenizer.decode([self.eos, *body], skip_special_tokens=False)
        return whole.removeprefix(mark).removeprefix(" " if self.begins_by_space else "")

    def require_readable(self, text: str) -> None:
        """Check that the tokenizer drops no character of a text, as some do with unknown ones.

        Raises:
            UsageError: one would be dropped, or is no character at all; says which.
        """
        if text in self.readable:
            return
        halves = [c for c in text if "\ud800" <= c <= "\udfff"]
        if halves:
            raise UsageError(
                f"{self.name}: a text holds half a surrogate pair, as in {text[:60]!a}",
                "write the whole character where this text comes from",
            )
        if not self.tokenizer.is_fast:
            return
        lost = dropped_characters(self.tokenizer, text)
        if lost:
            raise UsageError(
                f"{self.name}: its tokenizer has no token for {lost[0]!r}, as in {text[:60]!r}",
                "train the tokenizer on this data too, or use a public one",
            )
        self.readable.keep(text, text)
