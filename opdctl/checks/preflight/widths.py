"""Hidden states of student and teacher can be compared number by number only if they are as wide.

Where an objective compares them so and the sizes stand in a recipe or in a config.json that
``validate`` reads, it has said so already; here the configurations themselves are looked at.
"""

from __future__ import annotations

from opdctl.checks.preflight._pairing import Pairing
from opdctl.config.registry import member
from opdctl.types import Finding


class Widths:
    """Both sides are as wide, where an objective compares their hidden states."""

    revision = 1
    samples = False
    why = (
        "a loss on hidden states of two widths is a mean over numbers that do not belong together, "
        "or an error in the first step, after the rollouts are paid for (arxiv.org/abs/2606.06021, "
        "which needs a bridge there)"
    )

    def look(self, pairing: Pairing) -> list[Finding]:
        """One finding a teacher; of the stage where no objective compares states so."""
        used = [n for n, o in pairing.ctx.config.objectives.items() if o.coef]
        hints = [h for n in used if (h := getattr(member("objectives", n), "same_width", ""))]
        if not hints:
            return [Finding("ok", "no objective compares hidden states number by number")]
        found = []
        for name in pairing.teachers:
            ours, theirs = (
                m.net.config.get_text_config().hidden_size
                for m in (pairing.student, pairing.outline(name))
            )
            what = f"hidden states of width {ours} and, of {pairing.shown(name)}, {theirs}"
            severity, do = ("ok", "") if ours == theirs else ("error", hints[0])
            found.append(Finding(severity, what, do, name))
        return found
