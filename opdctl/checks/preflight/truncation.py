"""Measure the share of the student's responses that the length limit cuts off.

The limit is ``sampling.max_tokens``, or the largest that a controller may set. A response without
its end is wrong whatever it says, and the student is taught to go on.
"""

from __future__ import annotations

from opdctl.checks.preflight._checked_stage import CheckedStage
from opdctl.config.settings import longest_turn
from opdctl.protocols import Check
from opdctl.train.metrics import by_domain
from opdctl.types import Finding

SOME, MOST = 0.1, 0.5


class Truncation(Check):
    """A small share of the student's responses is cut at the length limit."""

    revision = 1
    samples = True
    why = (
        "a student that ended below its SFT start had 17 of 30 answers cut off "
        "(github.com/thinking-machines-lab/tinker-cookbook/issues/796); what follows is length "
        "that grows until all are (github.com/modelscope/ms-swift/issues/9526)"
    )

    def findings(self, stage: CheckedStage) -> list[Finding]:
        """Return one finding for the stage, by its worst domain."""
        rollouts = stage.rollouts
        shares = by_domain(rollouts, [float(r.truncated) for r in rollouts])
        limit = longest_turn(stage.ctx.config)
        listed = ", ".join(f"{d} {share:.2f}" for d, share in shares.items())
        worst = max(shares.values())
        severity = "error" if worst > MOST else "warning" if worst > SOME else "ok"
        do = (
            "raise sampling.max_tokens, or a cold start (sft) that teaches the student to end"
            if worst > SOME
            else ""
        )
        return [Finding(severity, f"share cut at {limit} tokens: {listed}", do)]
