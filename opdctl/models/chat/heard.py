"""The proof that a chat template says what its messages hold.

A template prints the keys it knows and drops the rest without a word: calls, a thought, a name.
Here a mark is put into the middle of each piece of each message (of a number: in its place), and
the marked conversation is rendered too. It must be the rendering of the real one with marks in it,
and where a mark stands, between the two halves of its piece, the piece is said. Only white space at
the ends of a piece may be missing.

Not asked for: ids of calls and their type, the name and the ids of a tool's turn, and what a schema
of a tool has beside names, descriptions and the values of an enum.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from opdctl.errors import UsageError
from opdctl.models.chat.control_tokens import unguarded
from opdctl.models.chat.messages import Message
from opdctl.models.chat.thinking import Thinking
from opdctl.types import Prompt

MARK = re.compile(r"qzm(\d{5})mzq|731(\d{5})137")  # in a text; in place of a number
SILENT = {"tool": ("role", "name", "id", "tool_call_id")}
SILENT["function"] = SILENT["ipython"] = SILENT["tool"]
SILENT_IN_CALL = ("id", "type", "index")
THOUGHT = ("reasoning", "thinking", "thought")  # what the keys of a thought begin with
TOOLS = -1  # stands for the number of a turn
Span = tuple[int, int]
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Piece:
    """A value that a message holds, or a part of its text.

    Attributes:
        turn: the number of its message, or TOOLS.
        path: the keys from the message to it.
        value: the text, or the number, truth value or null.
        kind: ``json``: arguments as text; ``key``: the last key of the path; ``tool``: printed
            somewhere; ``own``: the assistant's words.
        start: where the text begins in the value of the message.
    """

    turn: int
    path: Path
    value: Any
    kind: Literal["own", "thought", "text", "value", "json", "key", "tool"]
    start: int = 0

    @property
    def name(self) -> str:
        """The piece in words: ``tool_calls[0].function.name``, ``the thought in content``."""
        path = "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in self.path)
        path = path.removeprefix(".")
        if self.kind == "thought" and self.path == ("content",):
            return "the thought in content"
        return f"the key {path}" if self.kind == "key" else path


def message_pieces(turn: int, message: Message, marks: Thinking | None) -> Iterator[Piece]:
    """Yield what a message holds.

    Args:
        marks: the marks of thinking that part a thought from an answer; None is unknown: of the
            assistant's content the last line is taken.
    """
    role = message["role"]
    own = role == "assistant"
    for key, value in message.items():
        if key in SILENT.get(role, ("role",)):
            continue
        if key == "content" and isinstance(value, str):
            yield from _content(turn, value, own, marks)
        elif key in ("tool_calls", "function_call"):
            calls = list(enumerate(value)) if isinstance(value, list | tuple) else [(None, value)]
            for n, call in calls:
                yield from _call(turn, call, (key,) if n is None else (key, n))
        elif key.startswith(THOUGHT):
            yield from _leaves(turn, value, (key,), "thought")
        else:
            yield from _leaves(turn, value, (key,), "value")


def _content(turn: int, text: str, own: bool, marks: Thinking | None) -> Iterator[Piece]:
    if not own:
        yield from _text(turn, text, 0, ("content",), "text")
    elif marks is None:
        body = text.rstrip()
        start = body.rfind("\n") + 1
        yield from _text(turn, body[start:], start, ("content",), "own")
    else:
        both = [re.escape(m.strip() or m) for m in (marks.open, marks.close)]
        *_, answer = [0, *(m.end() for m in re.finditer(both[1], text))]
        at = 0
        for part in re.split(f"({'|'.join(both)})", text):
            if not re.fullmatch("|".join(both), part):
                kind = "thought" if at < answer else "own"
                yield from _text(turn, part, at, ("content",), kind)
            at += len(part)


def _text(turn: int, text: str, start: int, path: Path, kind: Any) -> Iterator[Piece]:
    if text.strip():
        yield Piece(turn, path, text.strip(), kind, start + len(text) - len(text.lstrip()))


def _call(turn: int, call: Any, path: Path) -> Iterator[Piece]:
    if not isinstance(call, Mapping):
        yield from _leaves(turn, call, path, "value")
        return
    for key, value in call.items():
        if key == "function":
            yield from _call(turn, value, (*path, key))
        elif key == "arguments" and isinstance(value, str):
            yield from _text(turn, value, 0, (*path, key), "json")
        elif key not in SILENT_IN_CALL:
            yield from _leaves(turn, value, (*path, key), "value")


def _leaves(turn: int, value: Any, path: Path, kind: Any) -> Iterator[Piece]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if kind == "value":
                yield from (replace(p, path=(*path, key)) for p in _text(turn, key, 0, (), "key"))
            yield from _leaves(turn, inner, (*path, key), kind)
    elif isinstance(value, list | tuple):
        for n, inner in enumerate(value):
            yield from _leaves(turn, inner, (*path, n), kind)
    elif isinstance(value, str):
        yield from _text(turn, value, 0, path, kind)
    else:
        yield Piece(turn, path, value, kind)


def tool_pieces(tools: Sequence[Mapping]) -> Iterator[Piece]:
    """Yield what a template has to say of tools: names, descriptions, the values of enums."""
    for n, tool in enumerate(tools):
        yield from _schema(tool, (n,))


def _schema(value: Any, path: Path, names: bool = False) -> Iterator[Piece]:
    """Yield the pieces of a schema, whose keys are names of parameters if ``names``."""
    if isinstance(value, list | tuple):
        for n, inner in enumerate(value):
            yield from _schema(inner, (*path, n))
    if not isinstance(value, Mapping):
        return
    for key, inner in value.items():
        here = (*path, key)
        if names:
            yield from (replace(p, path=here) for p in _text(TOOLS, key, 0, (), "key"))
        elif isinstance(inner, str) and key in ("name", "description"):
            yield from _text(TOOLS, inner, 0, here, "tool")
        elif key == "enum":
            yield from _leaves(TOOLS, inner, here, "tool")
            continue
        yield from _schema(inner, here, not names and key == "properties")


def find_pieces(
    render: Callable[[Sequence[Message], Sequence[Mapping]], str],
    turns: Sequence[Message],
    tools: Sequence[Mapping],
    pieces: Sequence[Piece],
) -> list[list[Span] | None]:
    """Return for each piece the places ``(from, to)`` of the rendering that say it.

    An empty list: the rendering does not depend on the piece, or says it otherwise than it is.
    None: a mark changes more of the rendering than its place, and the proof fails.
    """
    whole = render(turns, tools)
    if not pieces:
        return []
    numbers = [i for i, p in enumerate(pieces) if p.turn != TOOLS or _is_name(p)]

    def places(some: Sequence[int]) -> list[list[Span]] | None:
        chosen = [pieces[i] for i in some]
        try:
            marked = render(*_put_marks(turns, tools, chosen))
        except UsageError:
            return None
        return _align(whole, marked, chosen)

    spots: list[list[Span] | None] = [None] * len(pieces)
    at_once = places(numbers)
    for n, i in enumerate(numbers):
        alone = places([i]) if at_once is None else [at_once[n]]
        spots[i] = None if alone is None else alone[0]
    return spots


def _is_name(piece: Piece) -> bool:
    return piece.path[1:] in (("name",), ("function", "name"))


def _put_marks(
    turns: Sequence[Message], tools: Sequence[Mapping], pieces: Sequence[Piece]
) -> tuple[list[Message], list[Mapping]]:
    """Return the messages and the tools with mark number i in piece i."""
    by_place: dict[tuple[int, Path, bool], list[int]] = {}
    for i, piece in enumerate(pieces):
        by_place.setdefault((piece.turn, piece.path, piece.kind == "key"), []).append(i)

    def text(value: str, numbers: list[int]) -> str:
        for i in sorted(numbers, key=lambda i: -pieces[i].start):
            middle = pieces[i].start + (len(pieces[i].value) + 1) // 2
            quote = '"' if pieces[i].kind == "json" else ""  # is escaped if encoded once more
            value = f"{value[:middle]}qzm{i:05d}mzq{quote}{value[middle:]}"
        return value

    def walk(value: Any, turn: int, path: Path) -> Any:
        numbers = by_place.get((turn, path, False), [])
        if isinstance(value, Mapping):
            return {
                text(key, by_place.get((turn, (*path, key), True), [])): walk(
                    inner, turn, (*path, key)
                )
                for key, inner in value.items()
            }
        if isinstance(value, list | tuple):
            return [walk(inner, turn, (*path, n)) for n, inner in enumerate(value)]
        if isinstance(value, str):
            return text(value, numbers)
        return int(f"731{numbers[0]:05d}137") if numbers else value

    return [walk(m, n, ()) for n, m in enumerate(turns)], walk(list(tools), TOOLS, ())


def _align(whole: str, marked: str, pieces: Sequence[Piece]) -> list[list[Span]] | None:
    """Return the places of each piece in a rendering, from its marked one; None if they differ."""
    spots: list[list[Span]] = [[] for _ in pieces]
    at = cursor = 0
    for mark in MARK.finditer(marked):
        between = marked[cursor : mark.start()]
        number = int(mark[1] or mark[2])
        if not whole.startswith(between, at) or number >= len(pieces):
            return None
        at, cursor, piece = at + len(between), mark.end(), pieces[number]
        if not isinstance(piece.value, str):
            shown = _as_json(piece.value), str(piece.value)
            form = next((f for f in shown if whole.startswith(f, at)), None)
            if form is None:
                return None
            spots[number].append((at, at + len(form)))
            at += len(form)
            continue
        cursor += piece.kind == "json" and marked.startswith('"', cursor)
        middle = (len(piece.value) + 1) // 2
        own = piece.kind in ("json", "own", "thought")  # said as they are, and not escaped
        for form in (str,) if own else (str, _escape, _escape_ascii):
            left, right = form(piece.value[:middle]), form(piece.value[middle:])
            if whole.endswith(left, 0, at) and whole.startswith(right, at):
                spots[number].append((at - len(left), at + len(right)))
                break
    return spots if whole[at:] == marked[cursor:] else None


def _as_json(value: Any) -> str:
    return json.dumps(value, default=str)


def _escape(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _escape_ascii(text: str) -> str:
    return json.dumps(text)[1:-1]


def is_shown(piece: Piece, spots: list[Span] | None, text: str, span: Span | None = None) -> bool:
    """Return True if a part of a rendering, or all of it, says a piece.

    Where there is no proof, because the rendering depends on the piece in more than one place, it
    is enough that the piece stands there.
    """
    start, stop = span or (0, len(text))
    if spots is not None or piece.kind == "json":  # text that is escaped stands there too
        return any(start <= a and b <= stop for a, b in spots or ())
    value = piece.value if isinstance(piece.value, str) else _as_json(piece.value)
    return any(form(value) in text[start:stop] for form in (str, _escape, _escape_ascii))


def require_shown(chat: Any, turns: Sequence[Message], prompt: Prompt, text: str) -> None:
    """Check that a rendered prompt says what its turns and its tools hold.

    A thought of an earlier turn may be left out, as templates do.

    Args:
        chat: the model that renders.
        text: the rendering, with the header of the response.

    Raises:
        UsageError: a piece is left out; says which.
    """
    pieces = [p for n, m in enumerate(turns) for p in message_pieces(n, m, None)]
    pieces += tool_pieces(prompt.tools)

    def render(turns: Sequence[Message], tools: Sequence[Mapping]) -> str:
        return chat.apply(turns, replace(prompt, tools=tuple(tools)), generate=True)

    spots = find_pieces(render, turns, prompt.tools, pieces)
    for piece, places in zip(pieces, spots, strict=True):
        if piece.kind != "thought" and not is_shown(piece, places, text):
            raise left_out(chat.name, piece, turns)
    require_json(chat.name, turns, text)


def require_json(name: str, turns: Sequence[Message], text: str) -> None:
    """Check that no argument of a call is printed as Python prints lists and objects.

    Raises:
        UsageError: one is; says which.
    """
    for n, message in enumerate(turns):
        for key in ("tool_calls", "function_call"):
            for value in _containers(message.get(key), False):
                if str(value) != _as_json(value) and str(value) in text:
                    raise UsageError(
                        f"{name}: its chat template shows an argument of turn {n} "
                        f"({message['role']}) as Python prints it: {value!s:.60}",
                        "tojson in chat_template.jinja",
                    )


def _containers(value: Any, inside: bool) -> Iterator[Any]:
    """Yield the lists and the objects of the arguments of calls."""
    if isinstance(value, Mapping):
        if inside:
            yield dict(value)
        for key, inner in value.items():
            yield from _containers(inner, inside or key == "arguments")
    elif isinstance(value, list | tuple):
        if inside:
            yield list(value)
        for inner in value:
            yield from _containers(inner, inside)


def left_out(name: str, piece: Piece, turns: Sequence[Message], hint: str = "") -> UsageError:
    """Return the error of a piece that a model's chat template leaves out.

    Args:
        hint: another way out than that of the piece's kind.
    """
    if piece.turn == TOOLS:
        where = "the tools"
    else:
        where = f"turn {piece.turn} ({turns[piece.turn]['role']})"
    if not hint and piece.turn != TOOLS and piece.path[0] not in ("content", "tool_calls"):
        hint = f"leave {piece.path[0]!r} out of the data, or give it as the template reads it"
    value = unguarded(piece.value) if isinstance(piece.value, str) else piece.value
    return UsageError(
        f"{name}: its chat template leaves out {piece.name} of {where}: {value!r:.60}",
        hint or "mend chat_template.jinja, or use a model whose template has a place for it",
    )
