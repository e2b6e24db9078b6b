"""The conversations of a data set: the part that asks, the part that answers, and their form.

A message is a mapping with a role, a content and any other field its chat template reads
(``tool_calls``, ``name``, ``reasoning_content``). Text only: no images. No torch here.

Some tables hold messages, calls and tools as JSON text: it is read. A null is no value, wherever it
stands under a key: Arrow writes one for every key that some other row has.
"""

from __future__ import annotations

import json
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
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list | tuple) or not all(isinstance(c, Mapping) for c in calls):
            return f"the tool_calls of message {i} are no list of calls: {str(calls)[:40]!r}"
        content = message.get("content")
        if content is None and (calls or message.get("function_call")):  # a call without a word
            continue
        if not isinstance(content, str):
            return f"the content of message {i} is {type(content).__name__}, not text"
    if not question(messages):
        return "nobody asks before the assistant speaks"
    return ""


def without_nulls(value: Any) -> Any:
    """Return a value without the keys of objects that hold a null; nulls in lists stay."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(v) for v in value]
    return value


def read_messages(value: Any) -> Any:
    """Return a conversation, with its messages and its calls read where they are JSON text.

    An empty list of calls is no call, and arguments without a character are an empty object.
    """
    messages = _read(value)
    if not isinstance(messages, list | tuple):
        return messages
    messages = [_read(m) for m in messages]
    return [_read_calls(m) if isinstance(m, Mapping) else m for m in messages]


def _read_calls(message: Message) -> Message:
    read = dict(message)
    if "tool_calls" in message:
        calls = _read(message["tool_calls"])
        read["tool_calls"] = calls
        if isinstance(calls, list | tuple):
            read["tool_calls"] = [_with_arguments(_read(call)) for call in calls]
        if not calls:
            del read["tool_calls"]
    if "function_call" in message:
        read["function_call"] = _with_arguments(_read(message["function_call"]))
    return read


def _with_arguments(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"])}
    blank = isinstance(call.get("arguments"), str) and not call["arguments"].strip()
    return {**call, "arguments": "{}"} if blank else call


def read_tools(value: Any) -> Any:
    """Return the tools of a row, read where they, or the parameters of one, are JSON text."""
    tools = _read(value)
    if not isinstance(tools, list | tuple):
        return tools or []
    return [_with_parameters(_read(t)) for t in tools]


def _with_parameters(tool: Any) -> Any:
    if not isinstance(tool, Mapping):
        return tool
    read = {k: _read(v) if k in ("parameters", "input_schema") else v for k, v in tool.items()}
    return {**read, "function": _with_parameters(tool["function"])} if "function" in tool else read


def _read(value: Any) -> Any:
    """Return what JSON text holds, if it is an object or a list; else the value."""
    if not isinstance(value, str):
        return value
    try:
        held = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return held if isinstance(held, dict | list) else value


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
