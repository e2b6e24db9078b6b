"""A teacher scores the student's token ids, so an id must be the same token on both sides.

Equal sizes prove nothing: two vocabularies of one size may give each id another meaning. The end
token is compared separately: base and instruct models of one family share a vocabulary and end by
different tokens of it.
"""

from __future__ import annotations

from opdctl.checks.preflight._checked_stage import CheckedStage
from opdctl.protocols import Check
from opdctl.types import Finding


class Tokens(Check):
    """Every id is the same token on both sides, and the same one ends a response."""

    revision = 1
    samples = False
    why = (
        "a teacher reads the student's ids as its own tokens and scores another text "
        "(github.com/huggingface/trl/issues/4562); with two end tokens responses grow without end "
        "(github.com/modelscope/ms-swift/issues/9526)"
    )

    def findings(self, stage: CheckedStage) -> list[Finding]:
        """Return one finding for each teacher."""
        from opdctl.models.model import different_tokens

        findings = []
        for name in stage.teachers:
            student, teacher = stage.student, stage.outline(name)
            wrong = different_tokens(student, teacher)
            if wrong:
                findings.append(Finding("error", *wrong, name))
                continue
            same = f"{len(student.tokenizer.get_vocab())} tokens, and {student.tokenizer.eos_token}"
            findings.append(Finding("ok", f"{same} ends a response on both sides", teacher=name))
        return findings
