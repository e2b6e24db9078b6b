"""The conversations of a data set: the part that asks, the part that answers, and their form.

A message is a mapping with a role, a content and any other field its chat template reads
(``tool_calls``, ``name``, ``reasoning_content``). Text only: no images. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
RESPONSE_ROLES = ("assistant", "tool", "function", "ipython")  # a response is made of these


def invalid_reason(messages: Any) -> str:
    """Return why a conversation is malformed, in words; "" if it is not."""
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
    """Return the turns before the response.

    If the assistant speaks last, its response starts after the last turn that is neither its own
    nor a tool's; otherwise all turns are the question.
    """
    stop = len(messages)
    if messages[-1]["role"] == "assistant":
        while stop and messages[stop - 1]["role"] in RESPONSE_ROLES:
            stop -= 1
    return tuple(messages[:stop])


def question_text(messages: Sequence[Message]) -> str:
    """Return the question as one text, which determines the prompt's id and side of the split."""
    turns = question(messages)
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n".join(f"{m['role']}: {m.get('content') or ''}" for m in turns)


def last_answer(messages: Sequence[Message]) -> str:
    """Return the last turn if it is the assistant's, else ""."""
    last = messages[-1]
    return (last.get("content") or "") if last["role"] == "assistant" else ""


def with_tag(messages: Sequence[Message], tag: str) -> tuple[Message, ...]:
    """Put the tag of a mode after the last user turn of the question."""
    users = [i for i, m in enumerate(question(messages)) if m["role"] == "user"]
    if not tag or not users:
        return tuple(messages)
    at = users[-1]
    changed = {**messages[at], "content": messages[at]["content"] + tag}
    return (*messages[:at], changed, *messages[at + 1 :])
