"""A teacher's answer moved from its chat template to the student's: the marks of thinking.

Some templates open a block of thought at the end of the prompt, some write an empty one, some leave
it to the model. Text that the template wrote is not part of the answer, so the same answer under
another template lacks a mark or has it twice. Here the template's text and the answer are read as
one text, and the part that the student's template does not write is kept. Leaves out every other
difference between two templates (such as their syntax of tool calls).
"""

from __future__ import annotations

from opdctl.errors import UsageError
from opdctl.models.chat.rendering import Chat
from opdctl.models.chat.thinking import Thinking

LONGEST = 64  # tokens at the end of a prompt that are searched for an opening


def thought_opening(chat: Chat, ids: list[int], marks: Thinking) -> str:
    """Return the thought block that a prompt ends in: an opening, an empty block or ""."""
    text = chat.tokenizer.decode(ids[-LONGEST:])
    start, end, bare = marks.open.strip(), marks.close.strip(), text.rstrip()
    if bare.endswith(end):
        before = bare.removesuffix(end).rstrip()
        bare = before if before.endswith(start) else before + start  # some close alone
        return text[len(bare) - len(start) :]
    return text[len(bare) - len(start) :] if bare.endswith(start) else ""


def retemplate(text: str, before: str | None, ours: str, marks: Thinking, cut: bool = False) -> str:
    """Return an answer as the continuation of the student's prompt.

    Args:
        text: the answer.
        before: the opening that the teacher's template wrote; None if unknown (an API).
        ours: the opening that the student's template writes.
        marks: the domain's marks of thinking.
        cut: the answer ended at the limit.

    Raises:
        UsageError: the student's template closes the block that the answer thinks in, or a cut
            answer does not say whether it thinks.
    """
    if before == ours:
        return text
    start, end = marks.open.strip(), marks.close.strip()
    quiet = bool(before) and before.rstrip().endswith(end)  # told not to think
    full = text if quiet else (before or "") + text
    bare = full.lstrip()
    thought, closed, answer = bare.removeprefix(start).partition(end)
    inside = bare.startswith(start) or (bool(closed) and start not in thought)
    if ours.rstrip().endswith(end):
        if inside and (thought.strip() or not closed):
            raise UsageError(
                f"the student's chat template closes the block of thought, and an answer thinks: "
                f"{bare[:60]!r}",
                "thinking.mode=think with thinking.switch=true, a student whose template leaves "
                "the block to the answer, or a teacher that does not think",
            )
        return _after(ours, answer if inside else full)
    if ours:
        if before is None and cut and not inside:
            raise UsageError(
                f"an answer was cut before it said whether it thinks: {text[:60]!r}",
                "keep=verified, which leaves out what was cut, or a larger sampling.max_tokens",
            )
        return _after(ours, bare.removeprefix(start)) if inside else marks.close + full
    if inside:
        return full if bare.startswith(start) else marks.open + full
    return marks.lead("") + full if quiet and marks.mode == "no_think" else full


def _after(written: str, text: str) -> str:
    """Remove the leading white space of a text that the text before it already ends in."""
    return text.removeprefix(written[len(written.rstrip()) :])
