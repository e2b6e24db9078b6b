"""The white space that a chat template writes around an assistant's content, and what it trims.

Llama 2 writes a space before the content and one after it, Llama 3 trims the content. A response is
trained as the template would show it, up to its end token. Other text between the header and the
content (an empty block of thought) belongs to ``retemplated.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opdctl.errors import UsageError
from opdctl.models.chat.messages import Message

SAID = "\x02said\x03"


@dataclass(frozen=True)
class TurnFrame:
    """The white space around an assistant's content.

    Attributes:
        lead: between the header of a response and the content.
        trail: between the content and the end token.
        trims: whether the template removes white space at the content's beginning, and at its end.
    """

    lead: str = ""
    trail: str = ""
    trims: tuple[bool, bool] = (False, False)

    def around(self, text: str, sampled: bool = False, cut: bool = False) -> str:
        """Return a response as the template shows it.

        Args:
            sampled: a model wrote it: what stands there already is not written twice.
            cut: it has no end.
        """
        text = text.lstrip() if self.trims[0] and not sampled else text
        text = text.rstrip() if self.trims[1] and not sampled else text
        lead = "" if sampled and text.startswith(self.lead) else self.lead
        trail = "" if cut or (sampled and text.endswith(self.trail)) else self.trail
        return lead + text + trail


def frame_of(render: Callable[[Sequence[Message], bool], str], end: str) -> TurnFrame:
    """Return the frame of a chat template.

    Args:
        render: messages, and whether the header of a response follows -> text.
        end: the token that ends a turn.
    """
    question = {"role": "user", "content": "x"}
    sides = []
    try:
        header = render([question], True)
        for content in (SAID, f" {SAID} "):
            whole = render([question, {"role": "assistant", "content": content}], False)
            if not whole.startswith(header):
                return TurnFrame()
            before, said, after = whole[len(header) :].partition(SAID)
            space = after[: len(after) - len(after.lstrip())]
            if not said or before.strip() or not after[len(space) :].startswith(end):
                return TurnFrame()
            sides.append((before, space))
    except UsageError:
        return TurnFrame()
    (lead, trail), (wide_lead, wide_trail) = sides
    return TurnFrame(lead, trail, (wide_lead == lead, wide_trail == trail))
