"""The environment of skeleton: a call, as in <abc>, is told its length.

members: ./my_members
data: {mine: {kind: jsonl, path: mine.jsonl, environment: {skeleton: {}}}}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opdctl.config.schema import key


class Skeleton:
    """Answers a call with the number of characters in it."""

    revision = 1
    alphabet = "0123456789none"  # of its answers
    refusal = "none"

    @dataclass(kw_only=True)
    class Config:
        """The keys of skeleton."""

        open: str = key("<", "opens a call")
        close: str = key(">", "closes it; the turn ends there")
        turns: int = key(1, "calls that are answered", least=1)
        role: Literal["tool", "user"] = key("tool", "whose turn the chat template shows it as")

    def __init__(self, config) -> None:
        self.config = config
        self.turns, self.role = config.turns, config.role

    def reply(self, text: str) -> str | None:
        """Return the answer to a turn; None where it makes no call and is the last one."""
        body = text.strip()
        if not body.endswith(self.config.close) or self.config.open not in body:
            return None
        inner = body.removesuffix(self.config.close).rpartition(self.config.open)[2]
        return str(len(inner)) if inner else self.refusal
