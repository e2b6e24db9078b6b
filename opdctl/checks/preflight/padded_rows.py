"""Heads are padded to round sizes, and models of one family to different ones.

Ids beyond the tokenizer's are cut off on both sides (kernels/head.py), so heads of 151936 and
152064 rows are compared on the ids that exist. A head with fewer rows than there are ids cannot be.
"""

from __future__ import annotations

from opdctl.checks.preflight._checked_stage import CheckedStage
from opdctl.protocols import Check
from opdctl.types import Finding


class PaddedRows(Check):
    """Both heads have a row for every id, and rows beyond them are cut off."""

    revision = 1
    samples = False
    why = (
        "one family pads its vocabulary to 151936 rows here and to 152064 there; mass on a row "
        "without a token is divergence that nobody can learn "
        "(github.com/huggingface/trl/issues/3028)"
    )

    def findings(self, stage: CheckedStage) -> list[Finding]:
        """Return one finding for each teacher, and one for a student whose head is too short."""
        findings = []
        ours = self._rows(stage.student)
        if ours[0] < ours[1]:
            findings.append(self._short(f"the student {stage.ctx.config.student}", ours, ""))
        for name in stage.teachers:
            theirs = self._rows(stage.outline(name))
            if theirs[0] < theirs[1]:
                findings.append(self._short(stage.label(name), theirs, name))
                continue
            text = f"heads of {ours[0]} and {theirs[0]} rows for {ours[1]} ids"
            spare = [max(0, rows - ids) for rows, ids in (ours, theirs)]
            cut = f"{spare[0]} and {spare[1]} are cut off" if any(spare) else "no padding"
            findings.append(Finding("ok", f"{text}: {cut}", teacher=name))
        return findings

    @staticmethod
    def _rows(model) -> tuple[int, int]:
        """Return the number of rows of a model's head, and of ids of its tokenizer."""
        model.lm_head()  # refuses a head that is not one linear layer
        return model.head.out_features, 1 + max(model.tokenizer.get_vocab().values())

    @staticmethod
    def _short(who: str, rows: tuple[int, int], teacher: str) -> Finding:
        message = (
            f"the head of {who} has {rows[0]} rows, fewer than its tokenizer has ids: {rows[1]}"
        )
        return Finding("error", message, "resize its embedding to its tokenizer", teacher)
