"""A teacher with the student's own weights teaches nothing: every score is zero.

Weights are compared as they stand on disk. The stage is refused where every teacher is the student
and no signal learns from outcomes either. One such teacher among others is a warning: it may be
meant to keep its domain as it is (GLM-5's last checkpoint, DeepSeek-V4's and MiMo's self-teachers).
A teacher written ``policy`` is meant so, and is not reported.
"""

from __future__ import annotations

from opdctl.checks.preflight._checked_stage import CheckedStage
from opdctl.config.registry import member
from opdctl.protocols import Check
from opdctl.types import Finding


class Distinct(Check):
    """The teachers are not the student itself."""

    revision = 1
    samples = False
    why = (
        "a wrong path falls back to the base model, teacher and student are one, and the KL stays "
        "0 through the whole run (github.com/radixark/miles/blob/main/examples/"
        "on_policy_distillation/qwen3_5_35b_selfdistill/README.md)"
    )

    def findings(self, stage: CheckedStage) -> list[Finding]:
        """Return one finding for each teacher."""
        same = [name for name in stage.teachers if stage.same(name)]
        nothing = not (stage.differing or stage.served) and not learns_otherwise(stage.ctx.config)
        findings = []
        for name in stage.teachers:
            if name not in same:
                findings.append(Finding("ok", "its weights are not the student's", teacher=name))
                continue
            message = f"{stage.label(name)} has the weights of the student"
            if nothing:
                message += ", as every teacher here: nothing can be learnt"
                do = f"teachers.{name}: the checkpoint that was meant"
            else:
                message += f": {', '.join(stage.domains(name))} is kept as it is, and not taught"
                do = f"if that is meant, write {name}: policy"
            findings.append(Finding("error" if nothing else "warning", message, do, name))
        return findings


def learns_otherwise(config) -> bool:
    """Return True where a signal that asks no teacher is on."""
    active = [member("signals", name) for name, s in config.signals.items() if s.coef]
    return any(not [n for n in s.needs if n.startswith("teacher.")] for s in active)
