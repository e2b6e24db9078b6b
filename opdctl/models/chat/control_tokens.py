"""The control tokens of a tokenizer, and content that spells one: text stays text.

A tokenizer that reads a rendered conversation makes a control token of every text that spells one,
also where a question, an answer or a tool's result holds it. So content is marked before a template
sees it: GUARDS stand around each control token that it spells. Rendered text carries
these marks until it is encoded (``text_encoder.py``), and content without a control token is not
changed at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from opdctl.errors import UsageError
from opdctl.models.chat.thinking import Thinking

GUARDS = "\ufdd0\ufdd4"  # no characters, by Unicode; a template and JSON leave them as they are
RESERVED = re.compile("[\ufdd0-\ufdd4]")  # GUARDS, and what else marks rendered text
UNGUARD = str.maketrans("", "", GUARDS)
SPOKEN = ("content", "reasoning_content", "reasoning", "thinking")  # what an assistant says itself


@dataclass(frozen=True)
class ChatKeys:
    """The keys of a run that say how its models are spoken to.

    Attributes:
        date: the day that a chat template prints, in ISO's form; "" refuses one that prints it.
        marks: texts that an answer may write as tokens: marks of thinking and of calls.
        tags: the texts that a domain puts after its questions, which may be tokens too.
    """

    date: str = ""
    marks: frozenset[str] = field(
        default_factory=lambda: frozenset((Thinking().open, Thinking().close))
    )
    tags: tuple[str, ...] = ()


NO_KEYS = ChatKeys()


def chat_keys_of(date: str, domains: Mapping[str, Any]) -> ChatKeys:
    """Return the keys of a run.

    Args:
        domains: the configurations of its data, by name.
    """
    marks, tags = set(NO_KEYS.marks), []
    for domain in domains.values():
        thinking = domain.thinking
        marks |= {thinking.open.strip(), thinking.close.strip()}
        for config in domain.environment.values():
            marks |= {getattr(config, name, "") for name in ("open", "close")}
        tags += [thinking.tag] if thinking.tag else []
    return ChatKeys(date, frozenset(marks - {""}), tuple(dict.fromkeys(tags)))


@dataclass(frozen=True)
class ControlTokens:
    """The tokens that content may spell and must not become.

    Attributes:
        ids: text -> id of each.
        allowed: those that an assistant may write: marks that open or close a part of its answer.
        tags: what a domain puts after its questions: not content, but the recipe's own.
        name: the model, for messages.
    """

    ids: dict[str, int]
    allowed: frozenset[str] = frozenset()
    tags: tuple[str, ...] = ()
    name: str = ""

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches a control token; of two at one place the longer one."""
        longest_first = sorted(self.ids, key=lambda token: (-len(token), token))
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def pieces(self) -> re.Pattern[str]:
        """Matches in guarded text: 1, a spelled token in its guards; 2, a token of the template."""
        tokens = self.pattern.pattern
        return re.compile(f"{GUARDS[0]}({tokens}){GUARDS[1]}|({tokens})|[{GUARDS}]")

    def guard(self, content: Any, spoken: bool = False) -> Any:
        """Return content with guards around each control token that it spells and that has none.

        Args:
            content: a text, or lists and mappings of texts, whose names are guarded too.
            spoken: an assistant says it: the tokens in ``allowed`` stay tokens.
        """
        if isinstance(content, str):
            if not self.pattern.search(content):
                return content
            return self.pieces.sub(lambda match: self._guarded(match, spoken), content)
        if isinstance(content, Mapping):
            guarded = {self.guard(k): self.guard(v, spoken) for k, v in content.items()}
            return guarded if guarded != content else content
        if isinstance(content, list | tuple):
            return [self.guard(part, spoken) for part in content]
        return content

    def message(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a message with its content guarded; a domain's tag at its end stays."""
        spoken = message.get("role") == "assistant"
        guarded = {
            self.guard(name): self.guard(value, spoken and name in SPOKEN)
            for name, value in message.items()
        }
        if message.get("role") == "user" and isinstance(message.get("content"), str):
            guarded["content"] = self.question(message["content"])
        return guarded

    def question(self, text: str) -> str:
        """Return a question guarded, but for the tag of its domain at its end."""
        tag = next((t for t in self.tags if text.endswith(t)), "")
        return self.guard(text.removesuffix(tag)) + tag

    def spelled(self, guarded: Any) -> str:
        """Return the first control token that guarded content spells as text; "" without one."""
        if isinstance(guarded, Mapping):
            return self.spelled([*guarded, *guarded.values()])
        if isinstance(guarded, list | tuple):
            return next(filter(None, map(self.spelled, guarded)), "")
        if not isinstance(guarded, str):
            return ""
        return next((m[1] for m in self.pieces.finditer(guarded) if m[1]), "")

    def require_unmarked(self, content: Any) -> None:
        """Check that no text of some content has a character that marks rendered text.

        Raises:
            UsageError: it has one; says which.
        """
        if isinstance(content, Mapping):
            self.require_unmarked([*content, *content.values()])
        elif isinstance(content, list | tuple):
            for part in content:
                self.require_unmarked(part)
        elif isinstance(content, str) and (match := RESERVED.search(content)):
            raise UsageError(
                f"{self.name}: a text holds U+{ord(match[0]):04X}, which is no character: "
                f"{content[:60]!a}",
                "leave it out of the data: opdctl marks rendered text with it",
            )

    def _guarded(self, match: re.Match[str], spoken: bool) -> str:
        token = match[2]
        if not token or (spoken and token in self.allowed):
            return match[0]
        return f"{GUARDS[0]}{token}{GUARDS[1]}"


def unguarded(text: str) -> str:
    """Return rendered text as it reads, without guards."""
    return text.translate(UNGUARD)
