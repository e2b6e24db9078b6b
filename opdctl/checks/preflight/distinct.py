"""A teacher with the student's own weights teaches nothing: every score is zero.

Weights are compared as they stand on disk. Where every teacher is the student, and no outcome is
learnt from either, the stage is refused; one among others may be meant to keep its domain as it is
(GLM-5's last checkpoint, DeepSeek-V4's and MiMo's self-teachers) and is a warning. Written
``policy`` it is meant, and nothing is said.
"""

from __future__ import annotations

from opdctl.checks.preflight._pairing import Pairing
from opdctl.config.registry import member
from opdctl.types import Finding


class Distinct:
    """The teachers are not the student itself."""

    revision = 1
    samples = False
    why = (
        "a wrong path falls back to the base model, teacher and student are one, and the KL stays "
        "0 through the whole run (github.com/radixark/miles/blob/main/examples/"
        "on_policy_distillation/qwen3_5_35b_selfdistill/README.md)"
    )

    def look(self, pairing: Pairing) -> list[Finding]:
        """One finding a teacher."""
        same = [name for name in pairing.teachers if pairing.same(name)]
        nothing = not (pairing.differing or pairing.served) and not learns_otherwise(
            pairing.ctx.config
        )
        found = []
        for name in pairing.teachers:
            if name not in same:
                found.append(Finding("ok", "its weights are not the student's", teacher=name))
                continue
            what = f"{pairing.shown(name)} has the weights of the student"
            if nothing:
                what += ", as every teacher here: nothing can be learnt"
                do = f"teachers.{name}: the checkpoint that was meant"
            else:
                what += f": {', '.join(pairing.domains(name))} is kept as it is, and not taught"
                do = f"if that is meant, write {name}: policy"
            found.append(Finding("error" if nothing else "warning", what, do, name))
        return found


def learns_otherwise(config) -> bool:
    """Whether a signal is on that asks no teacher."""
    active = [member("signals", name) for name, s in config.signals.items() if s.coef]
    return any(not [n for n in s.needs if n.startswith("teacher.")] for s in active)
