"""What a tokenizer and its chat template make of a prompt, an answer, a turn of an environment.

A response may end by any of several tokens: those of the model's generation config, the
tokenizer's end token, and the one by which its template ends a turn of the assistant. The last is
what a demonstration ends by. Every rendering is checked for what the template must not drop.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from opdctl.errors import UsageError
from opdctl.models.chat.messages import Message, question
from opdctl.types import Prompt

MOST = 2**21  # ids, or characters, that a cache keeps: a stream brings new prompts for ever
SAID = "\x02said\x03"  # a turn's content, cut out again: it does not matter how it is shown


class Recent(dict):
    """Values of some length, the newest ones: no more than MOST in all, but for the last."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def keep(self, key: Any, value: Any) -> Any:
        """Add a value, the oldest ones go; returns it."""
        self[key] = value
        self.length += len(value)
        while self.length > MOST and len(self) > 1:
            self.length -= len(self.pop(next(iter(self))))
        return value


class Chat:
    """The rendering half of a model; has ``tokenizer`` and ``name``.

    Attributes:
        eos: the tokenizer's end token.
        end_of_turn: what ends a demonstration: the template's own end of a turn, else ``eos``.
        ends: every token that ends a response.
        pad: what fills a rectangle.
        rows: ids that the model has an embedding for.
    """

    tokenizer: Any
    name: str
    rows: int

    def begin_chat(self, generation: Any) -> None:
        """Find the end tokens.

        Args:
            generation: the model's generation config, or its config: has ``eos_token_id``.

        Raises:
            UsageError: the tokenizer has no end token.
        """
        self.generation = generation
        vars(self).pop("reads_thinking", None)
        self.rendered: Recent = Recent()  # ids by prompt
        self.answers: Recent = Recent()  # ids by what an environment said
        self.readable: Recent = Recent()  # texts
        token = self.tokenizer.eos_token_id
        if token is None:
            hint = "name one as eos_token in tokenizer_config.json: a response has to end"
            raise UsageError(f"{self.name}: its tokenizer has no end token", hint)
        stops = [i for i in _listed(generation) if 0 <= i < self.rows]  # others are never sampled
        self.eos: int = token
        self.end_of_turn: int = self._end_of_turn(stops)
        self.ends: tuple[int, ...] = tuple(dict.fromkeys((self.end_of_turn, self.eos, *stops)))
        pad = self.tokenizer.pad_token_id
        self.pad: int = token if pad is None else pad
        for ids, what in (([self.eos], "its end token"), ([self.pad], "padding")):
            self._known(ids, what)

    def take_template(self, template: Any, whose: str) -> None:
        """Speak by another model's chat template from now on; what is saved has it too.

        Args:
            template: of a tokenizer; None where it has none.
            whose: names that model.

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
        """Have other programs stop where this one does: the ends into the generation config."""
        if generation is not None and not set(self.ends) <= set(_listed(generation)):
            generation.eos_token_id = list(self.ends) if len(self.ends) > 1 else self.eos

    def _end_of_turn(self, stops: list[int]) -> int:
        """The token after an assistant's content, if it is a special one. Where the last turn has
        none (GLM), the first of the next turn, if the generation config stops there."""
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": SAID}]
        special = set(self.tokenizer.all_special_ids)
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        special |= {i for i, added_token in added.items() if added_token.special}
        for more, allowed in (([], special), ([turns[0]], set(stops))):
            try:
                after = self.apply([*turns, *more]).rpartition(SAID)[2]
            except UsageError:
                break
            ids = self.tokenizer(after, add_special_tokens=False)["input_ids"]
            if ids and ids[0] in allowed:
                return ids[0]
        return self.eos

    def apply(
        self, messages: Sequence[Message], prompt: Prompt | None = None, generate: bool = False
    ) -> str:
        """A conversation as text.

        Args:
            prompt: whose tools, and whose word to the template on thinking.
            generate: with the header of the response that is to come.

        Raises:
            UsageError: there is no template, or it refuses the conversation; says why.
        """
        options: dict[str, Any] = {}
        if prompt and prompt.enable_thinking is not None:
            options["enable_thinking"] = prompt.enable_thinking
        tools = list(prompt.tools) if prompt and prompt.tools else None
        if not self.tokenizer.chat_template:
            raise UsageError(
                f"{self.name}: its tokenizer has no chat template for {shown(messages)}",
                "put a chat_template.jinja beside the tokenizer, or ask by a text alone",
            )
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                add_generation_prompt=generate,
                tokenize=False,
                **options,
            )
        except Exception as error:  # a template may raise anything
            raise UsageError(
                f"{self.name}: its chat template refuses {shown(messages)}: {error!s:.200}",
                "leave out what it has no place for, or use a model whose template has one",
            ) from error

    def ids(self, text: str) -> list[int]:
        """Ids of rendered text; the template has put its own begin token there."""
        return self._known(self.tokenizer(text, add_special_tokens=False)["input_ids"], text)

    def _known(self, ids: list[int], text: str) -> list[int]:
        """The ids, each of which the embedding has a row for.

        Raises:
            UsageError: one has none: the tokenizer is larger than the model.
        """
        if ids and max(ids) >= self.rows:
            what = f"its tokenizer gives id {max(ids)} in {text[:60]!r}"
            raise UsageError(
                f"{self.name}: {what}, and its embedding has {self.rows} rows",
                "resize its embedding to its tokenizer",
            )
        return list(ids)

    def render(self, prompt: Prompt | str) -> list[int]:
        """Ids up to where the response starts.

        Args:
            prompt: or the text of a user turn alone.

        Raises:
            UsageError: the template drops a turn, does not hear of thinking, or begins twice.
        """
        key = prompt if isinstance(prompt, str) else (prompt.domain, prompt.id, prompt.text)
        if key not in self.rendered:
            if isinstance(prompt, str):
                prompt = Prompt("", "", prompt, "", {})
            return self.rendered.keep(key, self._render(prompt))
        return self.rendered[key]

    def prompt_length(self, prompt: Prompt) -> int:
        """Tokens of a rendered prompt, which is not kept."""
        return len(self._render(prompt))

    def _render(self, prompt: Prompt) -> list[int]:
        turns = question(self.turns(prompt))
        for message in turns:
            self.require_readable(message.get("content") or "")
        plain = len(turns) == 1 and not prompt.tools and prompt.enable_thinking is None
        if plain and not self.tokenizer.chat_template:
            return self._known(self.tokenizer(prompt.text)["input_ids"], prompt.text) or [self.eos]
        text = self.apply(turns, prompt, generate=True)
        self._require_heard(turns, prompt, text)
        ids, begin = self.ids(text), self.tokenizer.bos_token_id
        if begin is not None and ids[:2] == [begin, begin]:
            raise UsageError(
                f"{self.name}: a rendered prompt begins by {self.tokenizer.bos_token!r} twice",
                "its chat template and its prompts both write it: leave it out of the prompts",
            )
        return ids

    def turns(self, prompt: Prompt) -> tuple[Message, ...]:
        """A prompt's conversation, the domain's system turn first where it has none."""
        turns = tuple(prompt.messages) or ({"role": "user", "content": prompt.text},)
        if prompt.system and turns[0]["role"] not in ("system", "developer"):
            turns = ({"role": "system", "content": prompt.system}, *turns)
        return turns

    def _require_heard(self, turns: Sequence[Message], prompt: Prompt, text: str) -> None:
        last = [m for m in turns if m["role"] == "user"][-1:]
        for message in [*(m for m in turns if m["role"] in ("system", "developer")), *last]:
            said = message["content"] or ""
            if said.strip() not in text:
                what = "question" if message["role"] == "user" else f"{message['role']} turn"
                raise UsageError(
                    f"{self.name}: its chat template leaves the {what} out: {said[:40]!r}",
                    "mend chat_template.jinja, or use a model whose template has a place for it",
                )
        if prompt.enable_thinking is not None and not self.reads_thinking:
            raise UsageError(
                f"{self.name}: its chat template does not read enable_thinking "
                f"(data.{prompt.domain}.thinking.switch)",
                "thinking.switch=false, and a thinking.tag that its questions carry",
            )

    @cached_property
    def reads_thinking(self) -> bool:
        """Whether the template looks at ``enable_thinking``."""
        template = self.tokenizer.chat_template or ""
        return bool(re.search(r"\benable_thinking\b", str(template)))

    def after_prompt(self, prompt: Prompt, text: str, opened: str, closed: str) -> str:
        """A demonstration without the marks of thinking that the rendered prompt ends in.

        Some templates open the block of thought, or write an empty one, as they ask.
        """
        asked = self.tokenizer.decode(self.render(prompt)[-16:]).rstrip()
        if asked.endswith(closed.strip()):
            bare = text.removeprefix(opened)
            return bare.removeprefix(closed) if bare.startswith(closed) else text
        return text.removeprefix(opened) if asked.endswith(opened.strip()) else text

    def observation(
        self, text: str, role: str, end: int | None = None, prompt: Prompt | None = None
    ) -> list[int]:
        """Ids from the end of a turn of the model, past an environment's answer, to its next turn.

        Args:
            end: the token the turn ended by; the template's own unless given.

        Raises:
            UsageError: the tokenizer's chat template has no place for it.
        """
        end = self.end_of_turn if end is None else end
        key = (text, role, end, prompt and prompt.enable_thinking)
        if key not in self.answers:
            self.require_readable(text)
            return self.answers.keep(key, self._observation(text, role, end, prompt))
        return self.answers[key]

    def _observation(self, text: str, role: str, end: int, prompt: Prompt | None) -> list[int]:
        turns = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": SAID},
            {"role": role, "content": text},
        ]
        try:
            _, found, after = self.apply(turns, prompt, generate=True).rpartition(SAID)
        except UsageError as error:
            raise UsageError(
                f"{self.name}: no place for a turn of role {role}; {error.message}",
                "another role of the environment: role=user",
            ) from error
        if not found or text not in after:
            raise UsageError(
                f"{self.name}: its chat template does not show a turn and the answer to it",
                "use a model with a chat template of several turns",
            )
        # the model has written its end; where the template ends a turn by another, that one stays
        return self.ids(after.removeprefix(self.tokenizer.convert_ids_to_tokens(end)))

    def encode(self, answer: str) -> list[int]:
        """Ids of a response, with the token that ends a turn."""
        self.require_readable(answer)
        return [*self.ids(answer), self.end_of_turn]

    def decode(self, ids: list[int]) -> str:
        """Text of a response without its end token. Other special tokens stay: a verifier must not
        be shown a cleaner answer than was given."""
        body = ids[:-1] if ids and ids[-1] in self.ends else ids
        return self.tokenizer.decode(body, skip_special_tokens=False)

    def require_readable(self, text: str) -> None:
        """Every character must reach the model: some tokenizers drop what they do not know.

        Raises:
            UsageError: one would be dropped; says which.
        """
        if not self.tokenizer.is_fast or text in self.readable:
            return
        spans = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        covered = {i for start, stop in spans["offset_mapping"] for i in range(start, stop)}
        lost = [c for i, c in enumerate(text) if i not in covered and not c.isspace()]
        if lost:
            raise UsageError(
                f"{self.name}: its tokenizer has no token for {lost[0]!r}, as in {text[:60]!r}",
                "train the tokenizer on this data too, or use a public one",
            )
        self.readable.keep(text, text)


def _listed(generation: Any) -> list[int]:
    """The end tokens of a generation config, which names none, one or several.

    Raises:
        UsageError: it names something else.
    """
    found = getattr(generation, "eos_token_id", None)
    ids = [] if found is None else [found] if isinstance(found, int) else found
    if not isinstance(ids, list | tuple) or not all(isinstance(i, int) for i in ids):
        raise UsageError(
            f"eos_token_id of the generation config is {found!r:.60}", "one id, or a list of ids"
        )
    return list(ids)


def different_ends(student: Chat, teacher: Chat) -> tuple[str, str] | None:
    """``(what, what to do)`` if the teacher ends a response by a token that the student does not.

    The student would learn to say it, and go on.
    """
    said = [i for i in teacher.ends if i not in student.ends]
    if student.end_of_turn in teacher.ends and not said:
        return None
    ends = [
        " or ".join(repr(chat.tokenizer.convert_ids_to_tokens(i)) for i in chat.ends)
        for chat in (student, teacher)
    ]
    return (
        f"the student ends a response by {ends[0]}, {teacher.name} by {ends[1]}",
        "give both the same eos_token_id in generation_config.json and the same eos_token in "
        "tokenizer_config.json: the student would unlearn its own",
    )


def shown(messages: Sequence[Message]) -> str:
    """How messages name a conversation: its roles."""
    return "a conversation of " + ", ".join(m["role"] for m in messages)
