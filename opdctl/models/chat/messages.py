"""Conversations as data gives them: which part asks, which part answers, and are they well formed.

A message is a mapping with a role and a content, and what else its chat template reads
(``tool_calls``, ``name``, ``reasoning_content``). Text only: no images. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
WRITTEN = ("assistant", "tool", "function", "ipython")  # what a response is made of


def complaint(messages: Any) -> str:
    """What is wrong with a conversation, in words; empty if nothing is."""
    if not isinstance(messages, list | tuple) or not messages:
        return f"expected a list of messages, got {type(messages).__name__} {str(messages)[:40]!r}"
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"message {i} has no role"
        content = message.get("content")
        if content is None and message.get("tool_calls"):  # a call without a word
            continue
        if not isinstance(content, str):
            return f"the content of message {i} is {type(content).__name__}, not text"
    if not question(messages):
        return "nobody asks before the assistant speaks"
    return ""


def question(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The turns up to where a response starts.

    Where the assistant speaks last, its response began after the last turn that is neither its own
    nor a tool's; otherwise everything is asked.
    """
    stop = len(messages)
    if messages[-1]["role"] == "assistant":
        while stop and messages[stop - 1]["role"] in WRITTEN:
            stop -= 1
    return tuple(messages[:stop])


def text_of(messages: Sequence[Message]) -> str:
    """The question as one text: it names the prompt, and decides its side of the split."""
    asked = question(messages)
    if len(asked) == 1:
        return asked[0]["content"]
    return "\n".join(f"{m['role']}: {m.get('content') or ''}" for m in asked)


def answer_of(messages: Sequence[Message]) -> str:
    """What the assistant says last; empty where it does not speak last."""
    last = messages[-1]
    return (last.get("content") or "") if last["role"] == "assistant" else ""


def tagged(messages: Sequence[Message], tag: str) -> tuple[Message, ...]:
    """The tag of a mode put after the last user turn of the question."""
    users = [i for i, m in enumerate(question(messages)) if m["role"] == "user"]
    if not tag or not users:
        return tuple(messages)
    at = users[-1]
    changed = {**messages[at], "content": messages[at]["content"] + tag}
    return (*messages[:at], changed, *messages[at + 1 :])
