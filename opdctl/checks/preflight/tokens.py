"""A teacher scores the student's token ids, so an id must be the same token on both sides.

Equal sizes say nothing: two vocabularies of one size may have each id mean something else. The end
token is compared apart: base and instruct models of one family share a vocabulary and end by
different tokens of it.
"""

from __future__ import annotations

from opdctl.checks.preflight._pairing import Pairing
from opdctl.types import Finding


class Tokens:
    """Every id is the same token on both sides, and the same one ends a response."""

    revision = 1
    samples = False
    why = (
        "a teacher reads the student's ids as its own tokens and scores another text "
        "(github.com/huggingface/trl/issues/4562); with two end tokens responses grow without end "
        "(github.com/modelscope/ms-swift/issues/9526)"
    )

    def look(self, pairing: Pairing) -> list[Finding]:
        """One finding a teacher."""
        from opdctl.models.model import different_tokens

        found = []
        for name in pairing.teachers:
            student, teacher = pairing.student, pairing.outline(name)
            wrong = different_tokens(student, teacher)
            if wrong:
                found.append(Finding("error", *wrong, name))
                continue
            same = f"{len(student.tokenizer.get_vocab())} tokens, and {student.tokenizer.eos_token}"
            found.append(Finding("ok", f"{same} ends a response on both sides", teacher=name))
        return found
