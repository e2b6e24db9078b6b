"""A whole conversation as ids, with the spans that the assistant wrote.

The assistant's tokens are supervised, with the token that ends each of its turns; system, user and
tool turns never are. If the chat template marks the assistant's text ({% generation %}), its marks
are used. Otherwise the conversation is rendered up to each turn, and each rendering must be a
prefix of the next, or the conversation is refused: a template that rewrites earlier turns (Qwen3
drops their thinking) would show a turn in training differently from how it was sampled. Each
part is encoded as the text before it goes on, so the whole has the ids of the whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from opdctl.errors import UsageError
from opdctl.models.chat.control_tokens import unguarded
from opdctl.models.chat.messages import Message
from opdctl.models.chat.rendering import Chat
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


def render_conversation(chat: Chat, prompt: Prompt, every: bool) -> RenderedConversation:
    """Render the conversation of a prompt whose last turn is the assistant's.

    Args:
        every: supervise all of the assistant's turns; else the last only.

    Raises:
        UsageError: the turns cannot be told apart in the rendering; says where and what to do.
    """
    turns = chat.turns(prompt)
    assert turns[-1]["role"] == "assistant", "the data gives a question or a whole conversation"
    for message in turns:
        chat.require_readable(message.get("content") or "")
    chat.render(prompt)  # its checks: nothing is dropped, nothing begins twice
    if not chat.tokenizer.chat_template:
        chat.apply(turns, prompt)  # says that there is none
    if MARK.search(chat.tokenizer.get_chat_template(tools=list(prompt.tools) or None)):
        return _marked(chat, prompt, turns, every)
    return _by_prefix(chat, prompt, turns, every)


def _by_prefix(
    chat: Chat, prompt: Prompt, turns: tuple[Message, ...], every: bool
) -> RenderedConversation:
    whole = chat.apply(turns, prompt)
    places = [i for i, m in enumerate(turns) if m["role"] == "assistant"]
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    at = 0
    for i in places if every else places[-1:]:
        before = chat.apply(turns[:i], prompt, generate=True)
        after = chat.apply(turns[: i + 1], prompt)
        _require_prefix(chat, before, whole, i, "is asked for")
        _require_prefix(chat, before, after, i, "is asked for")
        _require_prefix(chat, after, whole, i, "is over")
        turn, end = _split_end(chat, after[len(before) :], whole[len(after) :], i == places[-1])
        ids += chat.ids(whole[at : len(before)], whole[:at])
        start = len(ids)
        ids += [*chat.ids(turn, before), end]
        spans.append((start, len(ids)))
        at = len(before) + len(turn) + len(chat.tokenizer.convert_ids_to_tokens(end))
    return RenderedConversation(ids, spans)


def _require_prefix(chat: Chat, part: str, whole: str, turn: int, when: str) -> None:
    if whole.startswith(part):
        return
    at = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), len(whole))
    raise UsageError(
        f"{chat.name}: its chat template shows a conversation otherwise once turn {turn} {when}: "
        f"{unguarded(part[at:])[:30]!r} becomes {unguarded(whole[at:])[:30]!r}",
        "sources.dataset.turns=last supervises the last turn alone; or a chat template with "
        "{% generation %} marks",
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


def _marked(
    chat: Chat, prompt: Prompt, turns: tuple[Message, ...], every: bool
) -> RenderedConversation:
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
    places = [i for i, m in enumerate(turns) if m["role"] == "assistant"]
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
    spans = spans if every else spans[-1:]
    return RenderedConversation(ids[: spans[-1][1]], spans)
