"""A whole conversation as ids, with the spans that the assistant wrote.

The assistant's tokens are supervised, with the token that ends each of its turns; system, user and
tool turns never are. If the chat template marks the assistant's text ({% generation %}), its marks
are used. Otherwise the conversation is rendered up to each turn, and each rendering must be a
prefix of the next, or the conversation is refused: a template that rewrites earlier turns (Qwen3
drops their thinking) would show a turn in training differently from how it was sampled. Each
part is encoded as the text before it goes on, so the whole has the ids of the whole.

All that a supervised message holds is in its span, and all that the others hold is in the
rendering, or the conversation is refused (``heard.py``). A thought that the template cuts out of
the last turn, as DeepSeek-R1's does, is put before the answer, where the template opens it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from opdctl.errors import UsageError
from opdctl.models.chat.arguments import readable
from opdctl.models.chat.control_tokens import GUARDS, unguarded
from opdctl.models.chat.heard import (
    Piece,
    Span,
    find_pieces,
    is_shown,
    left_out,
    message_pieces,
    require_json,
    tool_pieces,
)
from opdctl.models.chat.messages import Message
from opdctl.models.chat.rendering import Chat
from opdctl.models.chat.retemplated import retemplate, thought_opening
from opdctl.models.chat.thinking import Thinking
from opdctl.types import Prompt

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class RenderedConversation:
    """A rendered conversation.

    Attributes:
        ids: all of it, up to the end of the last turn of the assistant.
        spans: ``(from, to)`` places in ``ids`` that the assistant wrote, in order.
    """

    ids: list[int]
    spans: list[tuple[int, int]]


def render_conversation(
    chat: Chat, prompt: Prompt, every: bool, marks: Thinking | None = None
) -> RenderedConversation:
    """Render the conversation of a prompt whose last turn is the assistant's.

    Args:
        every: supervise all of the assistant's turns; else the last only.
        marks: the marks of thinking of its domain; None is the usual ones.

    Raises:
        UsageError: the turns cannot be told apart in the rendering, or it lacks a part of one; says
            where and what to do.
    """
    turns, prompt = chat.guarded(chat.turns(prompt), prompt)
    assert turns[-1]["role"] == "assistant", "the data gives a question or a whole conversation"
    chat.render(prompt)  # its checks: nothing is dropped, nothing begins twice
    if not chat.tokenizer.chat_template:
        chat.apply(turns, prompt)  # says that there is none

    def render(turns: Sequence[Message], tools: Sequence[Mapping]) -> str:
        return chat.apply(turns, replace(prompt, tools=tuple(tools)))

    turns = readable(render, turns, prompt.tools)
    whole = chat.apply(turns, prompt)
    talk = _Talk(chat, prompt, turns, whole, every, marks or Thinking())
    for piece in talk.pieces:
        chat.require_readable(unguarded(piece.value) if isinstance(piece.value, str) else "")
    talk.spots = find_pieces(render, turns, prompt.tools, talk.pieces)
    if MARK.search(chat.tokenizer.get_chat_template(tools=list(prompt.tools) or None)):
        return _marked(talk)
    return _by_prefix(talk)


class _Talk:
    """A conversation that is rendered.

    Attributes:
        whole: its rendering.
        answers: the numbers of the turns that are supervised.
        pieces: what its messages and tools hold.
        spots: for each piece, where ``whole`` says it; see ``find_pieces``.
    """

    def __init__(
        self,
        chat: Chat,
        prompt: Prompt,
        turns: tuple[Message, ...],
        whole: str,
        every: bool,
        marks: Thinking,
    ) -> None:
        self.chat, self.prompt, self.turns, self.whole = chat, prompt, turns, whole
        self.every, self.marks = every, marks
        self.own = [i for i, m in enumerate(turns) if m["role"] == "assistant"]
        self.answers = self.own if every else self.own[-1:]
        self.last = self.own[-1]
        self.pieces = [p for n, m in enumerate(turns) for p in message_pieces(n, m, marks)]
        self.pieces += tool_pieces(prompt.tools)
        self.spots: list[list[Span] | None] = []

    def is_cut(self) -> bool:
        """Return True if the template leaves a thought out of the content of the last turn."""
        return any(
            piece.turn == self.last
            and piece.kind == "thought"
            and piece.path == ("content",)
            and not is_shown(piece, spots, self.whole)
            for piece, spots in zip(self.pieces, self.spots, strict=True)
        )

    def require_said(self, spans: dict[int, Span], put: bool = False) -> None:
        """Check that the rendering says all pieces, those of supervised turns in their spans.

        Args:
            spans: the part of ``whole`` that each supervised turn is.
            put: the thought in the last turn's content was put there without the template.

        Raises:
            UsageError: a piece is not said; says which.
        """
        said = {
            (p.turn, p.value)
            for p, spots in zip(self.pieces, self.spots, strict=True)
            if p.kind == "thought" and is_shown(p, spots, self.whole, spans.get(p.turn))
        }  # some data has a thought under two names
        for piece, spots in zip(self.pieces, self.spots, strict=True):
            thought = piece.kind == "thought"
            if thought and (piece.turn not in spans or (piece.turn, piece.value) in said):
                continue
            if thought and put and piece.turn == self.last and piece.path == ("content",):
                continue
            if not is_shown(piece, spots, self.whole, spans.get(piece.turn)):
                raise left_out(self.chat.name, piece, self.turns, self._way_out(piece, spots))
        require_json(self.chat.name, self.turns, self.whole)

    def _way_out(self, piece: Piece, spots: list[Span] | None) -> str:
        if spots and piece.turn in self.answers:
            return "put it inside the part that the model writes, such as its {% generation %} mark"
        if piece.kind == "thought" and piece.turn != self.last:
            return "sources.dataset.turns=last supervises the last turn alone"
        if piece.kind == "thought" and piece.path != ("content",):
            whole = f"{self.marks.open}...{self.marks.close}answer"
            return f"write the thought into the content, as the model writes it: {whole!r}"
        return ""


def _by_prefix(talk: _Talk) -> RenderedConversation:
    chat, prompt, turns, whole = talk.chat, talk.prompt, talk.turns, talk.whole
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    places: dict[int, Span] = {}
    at, cut = 0, talk.is_cut()
    for i in talk.answers:
        before = chat.apply(turns[:i], prompt, generate=True)
        if cut and i == talk.last:
            turn, end, begin = _with_thought(talk, before)
            places[i] = (begin, len(whole))
            _require_prefix(talk, whole[:at], before, i, "is asked for")
        else:
            after = chat.apply(turns[: i + 1], prompt)
            _require_prefix(talk, before, whole, i, "is asked for")
            _require_prefix(talk, before, after, i, "is asked for")
            _require_prefix(talk, after, whole, i, "is over")
            rest = whole[len(after) :]
            turn, end = _split_end(chat, after[len(before) :], rest, i == talk.last)
            places[i] = (len(before), len(before) + len(turn))
        ids += chat.ids(before[at:], before[:at])
        start = len(ids)
        ids += [*chat.ids(turn, before), end]
        spans.append((start, len(ids)))
        at = len(before) + len(turn) + len(chat.tokenizer.convert_ids_to_tokens(end))
    talk.require_said(places, cut)
    return RenderedConversation(ids, spans)


def _with_thought(talk: _Talk, before: str) -> tuple[str, int, int]:
    """Put the thought of the last turn, which the template cuts, before the rest of its rendering.

    Args:
        before: the rendered prompt of the turn.

    Returns:
        The turn's text after ``before``; the token that ends it; where ``whole`` begins to say it.

    Raises:
        UsageError: the prompt closes the block of thought, or is another one in ``whole``.
    """
    chat, marks, content = talk.chat, talk.marks, talk.turns[talk.last]["content"]
    opening = thought_opening(chat, chat.ids(before), marks)
    header = before.removesuffix(opening)
    _require_prefix(talk, header, talk.whole, talk.last, "is asked for")
    rest, end = _split_end(chat, talk.whole[len(header) :], "", True)
    start, close = marks.open.strip() or marks.open, marks.close.strip() or marks.close
    thought, closed, answer = rest.partition(close)
    if closed and not thought.replace(start, "").strip():
        rest = answer  # an empty block in place of the thought
    answer = content.rpartition(close)[2]
    block = content[: len(content) - len(answer.lstrip())]
    return retemplate(block + rest.lstrip(), "", opening, marks), end, len(header)


def _require_prefix(talk: _Talk, part: str, whole: str, turn: int, when: str) -> None:
    if whole.startswith(part):
        return
    talk.require_said({i: (0, len(talk.whole)) for i in talk.answers}, talk.is_cut())
    at = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), len(whole))
    hint = "or a chat template with {% generation %} marks"
    if turn != talk.last or when == "is over":
        hint = f"sources.dataset.turns=last supervises the last turn alone; {hint}"
    elif part[at:].strip().startswith(talk.marks.open.strip()):
        hint = f"a thought in the turn's content, which this template opens; {hint}"
    raise UsageError(
        f"{talk.chat.name}: its chat template shows a conversation otherwise once turn {turn} "
        f"{when}: {unguarded(part[at:])[:30]!r} becomes {unguarded(whole[at:])[:30]!r}",
        hint.removeprefix("or "),
    )


def _split_end(chat: Chat, turn: str, rest: str, last: bool) -> tuple[str, int]:
    """Return a turn up to its end token, without what follows, and the token that ends it."""
    body = turn.rstrip()
    for end in chat.ends:
        mark = chat.tokenizer.convert_ids_to_tokens(end)
        if body.endswith(mark):
            return body.removesuffix(mark), end
        if not last and rest.startswith(mark):
            return turn, end
    if last:
        return turn, chat.end_of_turn
    raise UsageError(
        f"{chat.name}: its chat template ends a turn of the assistant by no token that ends a "
        f"response, but by {unguarded(rest)[:20]!r}",
        "sources.dataset.turns=last, or name its end in eos_token_id of generation_config.json",
    )


def _marked(talk: _Talk) -> RenderedConversation:
    chat, prompt, turns = talk.chat, talk.prompt, talk.turns
    ids, mask = chat.apply_marked(turns, prompt)
    starts = [i for i, m in enumerate(mask) if m and not (i and mask[i - 1])]
    spans = []
    for start in starts:
        stop = next((i for i in range(start, len(mask)) if not mask[i]), len(mask))
        while stop - 1 > start and chat.tokenizer.decode(ids[stop - 1]).isspace():
            stop -= 1  # what a template writes after the end of a turn
        if ids[stop - 1] not in chat.ends and stop < len(ids) and ids[stop] in chat.ends:
            stop += 1  # marks that leave the end out
        spans.append((start, stop))
    places = talk.own
    if len(spans) != len(places):
        raise UsageError(
            f"{chat.name}: its chat template marks {len(spans)} of {len(places)} turns of the "
            "assistant",
            "put {% generation %} around what the assistant says, in every turn",
        )
    for turn, (_, stop) in zip(places, spans, strict=True):
        if ids[stop - 1] not in chat.ends:
            raise UsageError(
                f"{chat.name}: turn {turn} of the assistant ends by no token that ends a response",
                "put the end of the turn inside the {% generation %} mark",
            )
    prompt_ids = chat.ids(chat.apply(turns[: places[0]], prompt, generate=True))
    if ids[: spans[0][0]] != prompt_ids:
        raise UsageError(
            f"{chat.name}: the {{% generation %}} mark does not begin where a response does",
            "put it after the header that add_generation_prompt writes",
        )
    at = chat.encoder.spans(talk.whole)[1]  # in the text without guards
    kept = [-1, *(i for i, c in enumerate(talk.whole) if c not in GUARDS), len(talk.whole)]
    said = {
        turn: (kept[at[a][0]] + 1, kept[at[b - 1][1] + 1])
        for turn, (a, b) in zip(places, spans, strict=True)
    }
    talk.require_said({turn: said[turn] for turn in talk.answers})
    spans = spans if talk.every else spans[-1:]
    return RenderedConversation(ids[: spans[-1][1]], spans)
