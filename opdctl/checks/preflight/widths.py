"""Hidden states of student and teacher can be compared number by number only at equal width.

``validate`` has refused unequal widths already where the recipe or a config.json says them; this
check reads the configurations of the models themselves.
"""

from __future__ import annotations

from opdctl.checks.preflight._checked_stage import CheckedStage
from opdctl.config.registry import member
from opdctl.protocols import Check
from opdctl.types import Finding


class Widths(Check):
    """Both sides are as wide, where an objective compares their hidden states."""

    revision = 1
    samples = False
    why = (
        "a loss on hidden states of two widths is a mean over numbers that do not belong together, "
        "or an error in the first step, after the rollouts are paid for (arxiv.org/abs/2606.06021, "
        "which needs a bridge there)"
    )

    def findings(self, stage: CheckedStage) -> list[Finding]:
        """Return one finding for each teacher, or one where no objective compares hidden states."""
        used = [n for n, o in stage.ctx.config.objectives.items() if o.coef]
        hints = [h for n in used if (h := member("objectives", n).same_width)]
        if not hints:
            return [Finding("ok", "no objective compares hidden states number by number")]
        findings = []
        for name in stage.teachers:
            ours, theirs = (
                m.net.config.get_text_config().hidden_size
                for m in (stage.student, stage.outline(name))
            )
            message = f"hidden states of width {ours} and, of {stage.label(name)}, {theirs}"
            severity, do = ("ok", "") if ours == theirs else ("error", hints[0])
            findings.append(Finding(severity, message, do, name))
        return findings
