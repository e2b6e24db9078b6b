"""A teacher's answer as the student's chat template would have it said: the marks of thinking.

Some templates open a block of thought as they ask, some write an empty one, some leave it to the
model. What the template wrote is no part of the answer, so an answer that is told again under
another template lacks a mark, or has it twice. Here what stands before and in the answer is read as
one text, and the part that the student's template does not write is kept. Leaves out everything
else in which two templates differ (tool calls in their own syntax).
"""

from __future__ import annotations

from opdctl.errors import UsageError
from opdctl.models.chat.rendering import Chat
from opdctl.models.chat.thinking import Thinking

LONGEST = 64  # tokens at the end of a prompt in which an opening stands


def opening(chat: Chat, ids: list[int], marks: Thinking) -> str:
    """What a rendered prompt ends in of a block of thought: its opening, an empty block, or ""."""
    text = chat.tokenizer.decode(ids[-LONGEST:])
    start, end, bare = marks.open.strip(), marks.close.strip(), text.rstrip()
    if bare.endswith(end):
        before = bare.removesuffix(end).rstrip()
        bare = before if before.endswith(start) else before + start  # some close alone
        return text[len(bare) - len(start) :]
    return text[len(bare) - len(start) :] if bare.endswith(start) else ""


def retold(text: str, before: str | None, ours: str, marks: Thinking, cut: bool = False) -> str:
    """An answer as it goes on after what the student's template wrote.

    Args:
        text: the answer.
        before: what the teacher's template opened; None where it is not known (an API).
        ours: what the student's template opens.
        marks: how the domain writes thinking.
        cut: the answer ended at the limit.

    Raises:
        UsageError: the student's template closes the block that the answer thinks in, or a cut
            answer does not say whether it thinks.
    """
    if before == ours:
        return text
    start, end = marks.open.strip(), marks.close.strip()
    quiet = bool(before) and before.rstrip().endswith(end)  # told not to think
    said = text if quiet else (before or "") + text
    whole = said.lstrip()
    thought, closed, answer = whole.removeprefix(start).partition(end)
    inside = whole.startswith(start) or (bool(closed) and start not in thought)
    if ours.rstrip().endswith(end):
        if inside and (thought.strip() or not closed):
            raise UsageError(
                f"the student's chat template closes the block of thought, and an answer thinks: "
                f"{whole[:60]!r}",
                "thinking.mode=think with thinking.switch=true, a student whose template leaves "
                "the block to the answer, or a teacher that does not think",
            )
        return _after(ours, answer if inside else said)
    if ours:
        if before is None and cut and not inside:
            raise UsageError(
                f"an answer was cut before it said whether it thinks: {text[:60]!r}",
                "keep=verified, which leaves out what was cut, or a larger sampling.max_tokens",
            )
        return _after(ours, whole.removeprefix(start)) if inside else marks.close + said
    if inside:
        return said if whole.startswith(start) else marks.open + said
    return marks.lead("") + said if quiet and marks.mode == "no_think" else said


def _after(written: str, text: str) -> str:
    """A text without the white space that already stands before it."""
    return text.removeprefix(written[len(written.rstrip()) :])
