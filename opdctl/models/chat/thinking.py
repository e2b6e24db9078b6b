"""Reasoning before the answer: the mode a domain asks for, how it is written and read.

A mode is part of the question (Qwen3's ``/think`` and ``/no_think``, arXiv 2505.09388; the efforts
of DeepSeek-V4, arXiv 2606.19348), so a task in a mode is a domain of its own, with its own teacher.
A response is ``open thought close answer``; without thinking its block is empty, as in Qwen3, or
not there where the chat template writes it as it asks. White space around the marks is written and
not looked for.

For models that are trained from nothing the demonstrated thought is the answer to each prefix of
the question's items: a count, a reversed word, a sorted list, grown by one item at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opdctl.config.schema import key


@dataclass(kw_only=True)
class Thinking:
    """The way a domain's questions ask for thinking and its responses show it."""

    mode: Literal["free", "think", "no_think"] = key(
        "free", "free: all of a response is the answer; else a response of the other mode is wrong"
    )
    tag: str = key("", "put after the question, such as ' /think'")
    switch: bool = key(
        False, "tell the chat template: enable_thinking is true in mode think", neutral=True
    )
    open: str = key("<think>", "opens the block")
    close: str = key("</think>", "closes it")

    def lead(self, thought: str) -> str:
        """Return the text of a demonstration before its answer: the thought in its marks."""
        if self.mode == "free":
            return thought
        return self.open + (thought if self.mode == "think" else "") + self.close

    def split(self, text: str) -> tuple[str, str]:
        """Split a response into (thought, answer). Without a closing mark there is no thought."""
        if self.mode == "free":
            return "", text
        before, mark, after = text.rpartition(self.close.strip() or self.close)
        opened = self.open.strip()
        return (before.strip().removeprefix(opened).strip() if mark else ""), after

    def follows_mode(self, text: str) -> bool:
        """Return True if a response thinks exactly when its mode says so.

        A block that is opened and not closed is a thought without an answer: it follows no mode.
        """
        if self.mode == "free":
            return True
        thought, answer = self.split(text)
        opened = self.open.strip() or self.open
        return bool(thought) == (self.mode == "think") and opened not in answer


@dataclass(kw_only=True)
class Trace:
    """The thought of a demonstration: the answers to growing prefixes of a metadata field."""

    fold: Literal["none", "count", "reverse", "sort"] = key(
        "none", "count: characters equal to target; reverse: characters; sort: numbers of a list"
    )
    over: str = key("", "metadata field with the items")
    target: str = key("", "count: a character, or the metadata field that holds it")
    separator: str = key("", "between entries, and between the numbers of one")
    every: int = key(1, "items between two entries; the last one is always there", least=1)

    def write(self, metadata: dict, lowercase: bool = False) -> str:
        """Return the thought of one question, its items in lower case if the question is.

        Raises:
            KeyError: the metadata has no such field.
            ValueError: an item to sort is not a number.
        """
        if self.fold == "none":
            return ""
        values = metadata[self.over]
        if self.fold == "sort":
            items = [str(i).removesuffix(".0") for i in values]
        else:
            text = "".join(values)
            items = list(text.lower() if lowercase else text)
        ends = [n for n in range(1, len(items) + 1) if n % self.every == 0 or n == len(items)]
        return self.separator.join(self._answer(items[:n], metadata) for n in ends)

    def _answer(self, items: list[str], metadata: dict) -> str:
        if self.fold == "count":
            return str(items.count(metadata.get(self.target, self.target)))
        if self.fold == "reverse":
            return "".join(reversed(items))
        descending = str(metadata.get("direction", "")).startswith("desc")
        return self.separator.join(sorted(items, key=float, reverse=descending))
