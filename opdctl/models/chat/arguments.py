"""The arguments of calls, in the form that a chat template reads: an object, or JSON text.

Data has both. A template that writes JSON itself (``tojson``) would encode a text once more; one
that puts quotes around nothing would print an object as Python does, or fails on it. The rendering
tells: data is given to the template as it is if that is said as it is, else in the other form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opdctl.errors import UsageError
from opdctl.models.chat.heard import find_pieces, message_pieces
from opdctl.models.chat.messages import Message

CALLS = ("tool_calls", "function_call")


def readable(
    render: Callable[[Sequence[Message], Sequence[Mapping]], str],
    turns: Sequence[Message],
    tools: Sequence[Mapping],
) -> tuple[Message, ...]:
    """Return a conversation with the arguments of its calls as the template says them.

    If no form is said, they stay as they are: what the template leaves out is refused elsewhere.
    A call without a content has an empty one if the template fails without.

    Args:
        render: renders messages and tools; raises UsageError where the template does.

    Raises:
        UsageError: the template refuses the conversation in every form.
    """
    turns = tuple(turns)
    if not any(m.get(key) for m in turns for key in CALLS):
        return turns
    forms = [turns, _each(turns, _object), _each(turns, _text)]
    forms += [tuple({"content": "", **m} for m in form) for form in forms]
    first: UsageError | None = None
    rendered: tuple[Message, ...] | None = None
    for form in [f for i, f in enumerate(forms) if f not in forms[:i]]:
        try:
            text = render(form, tools)
        except UsageError as error:
            first = first or error
            continue
        rendered = rendered or form
        if _says_arguments(render, form, tools, text):
            return form
    if rendered is None and first is not None:
        raise first
    return rendered or turns


def _says_arguments(
    render: Callable[[Sequence[Message], Sequence[Mapping]], str],
    turns: Sequence[Message],
    tools: Sequence[Mapping],
    text: str,
) -> bool:
    pieces = [
        piece
        for n, message in enumerate(turns)
        for piece in message_pieces(n, message, None)
        if piece.path[0] in CALLS and "arguments" in piece.path
    ]
    if any(_as_python(call) in text for call in _objects(turns)):
        return False
    return all(find_pieces(render, turns, tools, pieces))


def _objects(turns: Sequence[Message]) -> list[Any]:
    """Return the arguments that Python does not print as JSON."""
    arguments: list[Any] = []

    def collect(value: Any) -> Any:
        arguments.append(value)
        return value

    _each(turns, collect)
    return [a for a in arguments if isinstance(a, Mapping) and a and _as_python(a) != _text(a)]


def _as_python(value: Mapping) -> str:
    return str(dict(value))


def _each(turns: Sequence[Message], change: Callable[[Any], Any]) -> tuple[Message, ...]:
    """Return a conversation with the arguments of each call changed."""

    def call(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if isinstance(value.get("function"), Mapping):
            return {**value, "function": call(value["function"])}
        return {**value, "arguments": change(value["arguments"])} if "arguments" in value else value

    changed = []
    for message in turns:
        new = dict(message)
        if isinstance(message.get("tool_calls"), list | tuple):
            new["tool_calls"] = [call(c) for c in message["tool_calls"]]
        if "function_call" in message:
            new["function_call"] = call(message["function_call"])
        changed.append(new)
    return tuple(changed)


def _object(arguments: Any) -> Any:
    """Return arguments as an object, or a list, if they are the text of one."""
    if not isinstance(arguments, str):
        return arguments
    try:
        read = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return read if isinstance(read, dict | list) else arguments


def _text(arguments: Any) -> Any:
    """Return arguments as JSON text, as transformers' ``tojson`` writes it."""
    if isinstance(arguments, str):
        return arguments
    try:
        return json.dumps(arguments, ensure_ascii=False)
    except TypeError:  # a date: the template will refuse it too
        return arguments
