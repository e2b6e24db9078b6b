"""A chat template and a tokenizer as one function: messages -> rendered text -> ids.

Rendered text is guarded: a control token that content spells has guards around it, so nothing that
reads the text takes it for one (``control_tokens.py``). Text that goes on from other text is
encoded together with the end of it: tokenizers that begin words by a space (SentencePiece's) give
other ids to a text that stands alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from opdctl.errors import UsageError
from opdctl.models.chat.control_tokens import (
    GUARDS,
    NO_KEYS,
    ChatKeys,
    ControlTokens,
    unguarded,
)
from opdctl.models.chat.messages import Message
from opdctl.models.chat.template_source import (
    CLOSED,
    OPENED,
    UNDATED,
    unrepeatable,
    with_date,
    with_marks,
)
from opdctl.models.chat.text_encoder import TextEncoder
from opdctl.models.chat.turn_frame import SAID
from opdctl.types import Prompt

PLACEHOLDER = SAID  # stands for a turn's content, and is cut out of the rendering again
ANY_DAY = "2000-01-01"  # of renderings that are looked at and never encoded
ESCAPED = json.dumps(GUARDS[0])[1:-1]
ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")
NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # tokens that a tokenizer names
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


class Templating:
    """The part of a model that turns messages into text, and text into ids.

    Attributes:
        chat_keys: the keys of the run that say how the model is spoken to.
        rows: rows of the model's embedding; every id is below this number.
        ends: every token that ends a response.
    """

    tokenizer: Any
    name: str
    rows: int
    chat_keys: ChatKeys = NO_KEYS
    ends: tuple[int, ...]

    def forget_template(self) -> None:
        """Drop what was worked out of the template and the tokenizer."""
        for name in list(vars(self)):
            if isinstance(getattr(type(self), name, None), cached_property):
                del vars(self)[name]
        self.sources: dict[tuple[str, str], tuple[str, str]] = {}

    def apply(
        self, messages: Sequence[Message], prompt: Prompt | None = None, generate: bool = False
    ) -> str:
        """Render a conversation as guarded text.

        Args:
            prompt: gives the tools and ``enable_thinking``.
            generate: end with the header of the coming response.

        Raises:
            UsageError: there is no template, it refuses the conversation, or it would render it
                otherwise another time; says why.
        """
        return self._render_guarded(messages, prompt, generate, self.chat_keys.date)

    def probe(self, messages: Sequence[Message], generate: bool = False) -> str:
        """Render messages of placeholders, to look at what the template writes around them."""
        return self._apply(messages, None, None, generate, ANY_DAY)

    def apply_marked(self, messages: Sequence[Message], prompt: Prompt) -> tuple[list[int], list]:
        """Render a conversation by a template that marks what the assistant says.

        Returns:
            The ids of all of it, and for each of them 1 where it stands in a mark, else 0.
        """
        text = self._render_guarded(messages, prompt, False, self.chat_keys.date, marked=True)
        ids, places = self.encoder.spans(text.replace(OPENED, "").replace(CLOSED, ""))
        spans, at = [], 0
        for part in re.split(f"({OPENED}|{CLOSED})", unguarded(text)):
            if part == OPENED:
                spans.append([at, at])
            elif part == CLOSED:
                spans[-1][1] = at
            else:
                at += len(part)
        inside = [any(a < to and start < b for a, b in spans) for start, to in places]
        return self.require_embedded(ids, text), [int(flag) for flag in inside]

    def guarded(
        self, messages: Sequence[Message], prompt: Prompt
    ) -> tuple[tuple[Message, ...], Prompt]:
        """Return a conversation, and the prompt with its tools, guarded.

        Raises:
            UsageError: a text holds a character that marks rendered text.
        """
        self.control.require_unmarked([*messages, *prompt.tools])
        tools = tuple(self.control.guard(list(prompt.tools)))
        return tuple(map(self.control.message, messages)), replace(prompt, tools=tools)

    def _render_guarded(
        self,
        messages: Sequence[Message],
        prompt: Prompt | None,
        generate: bool,
        date: str,
        marked: bool = False,
    ) -> str:
        tools = self.control.guard(list(prompt.tools)) if prompt and prompt.tools else None
        guarded = [self.control.message(message) for message in messages]
        text = self._apply(guarded, prompt, tools, generate, date, marked)
        wrong = ""
        if ESCAPED in text:
            wrong = "writes escapes into content that spells a control token"
        elif ADDRESS.search(text) and not ADDRESS.search(str((messages, tools))):
            wrong = "prints an object, whose address is another each time"
        if wrong:
            raise UsageError(f"{self.name}: its chat template {wrong}", "mend chat_template.jinja")
        return text

    def _apply(
        self,
        messages: Sequence[Message],
        prompt: Prompt | None,
        tools: list | None,
        generate: bool,
        date: str,
        marked: bool = False,
    ) -> str:
        options: dict[str, Any] = {}
        if prompt and prompt.enable_thinking is not None:
            options["enable_thinking"] = prompt.enable_thinking
        if not self.tokenizer.chat_template:
            raise UsageError(
                f"{self.name}: its tokenizer has no chat template for {roles_of(messages)}",
                "put a chat_template.jinja beside the tokenizer, or ask by a text alone",
            )
        source, differs = "", ""
        try:
            source, differs = self._source(self.tokenizer.get_chat_template(tools=tools), date)
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=with_marks(source) if marked else source,
                add_generation_prompt=generate,
                tokenize=False,
                **options,
            )
        except Exception as error:  # a template may raise anything
            if UNDATED in str(error):
                raise self._prints_the_date() from error
            raise UsageError(
                f"{self.name}: its chat template refuses {roles_of(messages)}: {error!s:.200}",
                "leave out what it has no place for, or use a model whose template has one",
            ) from error
        if differs:
            raise UsageError(
                f"{self.name}: its chat template {differs}: the prompts of a stage that is resumed "
                "would be others",
                "mend chat_template.jinja: prompts must be the same each time",
            )
        return text

    def _prints_the_date(self) -> UsageError:
        import datetime

        return UsageError(
            f"{self.name}: its chat template prints the date (strftime_now), so that the prompts "
            "of a stage that is resumed on another day would be others",
            f"runtime.template_date={datetime.date.today().isoformat()}, which every stage of the "
            "run is then shown",
        )

    def _source(self, template: str, date: str) -> tuple[str, str]:
        """Return the template with its date, and what else of it changes between renderings."""
        key = (template, date)
        if key not in self.sources:
            source = with_date(template, date)
            self.sources[key] = source, unrepeatable(source)
        return self.sources[key]

    @cached_property
    def reads_thinking(self) -> bool:
        """A flag: the template reads ``enable_thinking``."""
        template = self.tokenizer.chat_template or ""
        return bool(re.search(r"\benable_thinking\b", str(template)))

    @cached_property
    def control(self) -> ControlTokens:
        """The tokens that content may not become.

        They are the special ones, and those that end a response or that the template writes around
        the turns of a plain conversation. An answer may write the marks of thinking and of calls,
        and others that the template names, but none that frames a turn.
        """
        added = {t.content: i for i, t in self.tokenizer.added_tokens_decoder.items()}
        special = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        special |= set(self.tokenizer.all_special_tokens)
        marks = self.chat_keys.marks
        talk = [{"role": r, "content": PLACEHOLDER} for r in ("user", "assistant")]
        plain = self._frames([talk, [{"role": "system", "content": PLACEHOLDER}, talk[0]]])
        every = self._frames([[talk[0], {"role": r, "content": PLACEHOLDER}] for r in ROLES])
        around = {t for t in added if not t.isspace() and t in plain and t not in marks}
        ends = {t for t, i in added.items() if i in getattr(self, "ends", ())}
        control = {t for t in special | around | ends if t}
        named = {t for t in control if t in str(self.tokenizer.chat_template or "")}
        framing = {t for t in control if t in plain + every} - marks | ends
        roles = {getattr(self.tokenizer, f"{role}_token", None) for role in NAMED}
        allowed = (marks & control) | named
        ids = {t: self.tokenizer.convert_tokens_to_ids(t) for t in sorted(control)}
        return ControlTokens(
            ids, frozenset(allowed - framing - roles), self.chat_keys.tags, self.name
        )

    def _frames(self, conversations: Sequence[Sequence[Message]]) -> str:
        """Return what the template writes around the turns of conversations, one after another."""
        texts = []
        for messages in conversations:
            for generate in (False, True):
                try:
                    texts.append(self.probe(messages, generate))
                except UsageError:
                    break
        return "\n".join(texts)

    @cached_property
    def encoder(self) -> TextEncoder:
        return TextEncoder(self.tokenizer, self.control)

    def ids(self, text: str, after: str = "", sampled: bool = False) -> list[int]:
        """Return the ids of rendered text; the template has written the begin token itself.

        Args:
            after: the rendered text before it, whose ids stay as they are without it.
            sampled: a model wrote the text after that: it is encoded apart where the tokenizer
                would join both.

        Raises:
            UsageError: the tokenizer has a token for the end of the one and the beginning of the
                other together.
        """
        if not (after and text):
            return self.require_embedded(self.encoder.ids(text), text)
        tail = self.encoder.tail(after)
        head, whole = self.encoder.ids(tail), self.encoder.ids(tail + text)
        if whole[: len(head)] == head:
            return self.require_embedded(whole[len(head) :], text)
        if sampled and not self.adds_space:
            return self.require_embedded(self.apart(text), text)
        place = next(i for i, (a, b) in enumerate(zip([*head, -1], whole, strict=False)) if a != b)
        joined = self.tokenizer.convert_ids_to_tokens(whole[place : place + 1])
        raise UsageError(
            f"{self.name}: its tokenizer ({self._kind}) joins the end of {unguarded(tail)[-30:]!r} "
            f"and the beginning of {unguarded(text)[:30]!r} in one token {joined}: "
            "a response would be trained after other tokens than it is sampled after",
            "begin the answer without white space; or a chat template whose header ends in a "
            "control token",
        )

    @property
    def _kind(self) -> str:
        """The name of a tokenizer in messages: its class and its model."""
        model = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "model", None)
        inner = f", {type(model).__name__}" if model is not None else ""
        return f"{type(self.tokenizer).__name__}{inner}"

    def apart(self, text: str) -> list[int]:
        """Return the ids of text after a control token."""
        end = self.tokenizer.convert_ids_to_tokens(self.ends[0])
        ids = self.encoder.ids(end + text)
        return ids[1:] if ids[:1] == [self.ends[0]] else self.encoder.ids(text)

    @cached_property
    def adds_space(self) -> bool:
        """A flag: text right after a control token begins as a word does after a space."""
        line = self.apart("\n")
        for sign in ("x", "1", "a", "0"):
            inside, after = self.apart(f"\n{sign}"), self.apart(sign)
            if inside[: len(line)] == line and inside[len(line) :] != after:
                return True
        return False

    def require_embedded(self, ids: list[int], text: str) -> list[int]:
        """Return the ids, after checking that the embedding has a row for each.

        Raises:
            UsageError: it has not: the tokenizer is larger than the model.
        """
        if ids and max(ids) >= self.rows:
            too_large = f"its tokenizer gives id {max(ids)} in {text[:60]!r}"
            raise UsageError(
                f"{self.name}: {too_large}, and its embedding has {self.rows} rows",
                "resize its embedding to its tokenizer",
            )
        return list(ids)


def roles_of(messages: Sequence[Message]) -> str:
    """Return the name of a conversation in error messages: its roles."""
    return "a conversation of " + ", ".join(m["role"] for m in messages)
