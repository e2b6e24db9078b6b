"""T2, Thinking Machines: one prompt, sampled often, is nearly enough for OPD."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import DELTA_RECOVERY, Part, name, recovery, wide_gaps


class T2:
    """One prompt with many rollouts teaches nearly everything; imitation of it teaches nothing."""

    revision = 1
    statement = "one prompt, many rollouts is nearly enough"
    source = "Thinking Machines, On-Policy Distillation"
    reported = "20 steps x 256 rollouts of one prompt: about the teacher's AIME'24"
    threshold = "recovery >= .7 on held-out prompts; SFT on that prompt <= .2"

    @dataclass(kw_only=True)
    class Config:
        """Who plays."""

        opd: str = key(REQUIRED, "the student of OPD on one prompt", ref=True)
        sft: str = key(REQUIRED, "the student of SFT on it", ref=True)
        start: str = key(REQUIRED, "the start of both", ref=True)
        teacher: str = key(REQUIRED, "the teacher", ref=True)
        domain: str = key(REQUIRED, "domain", domains=True)

    @staticmethod
    def parts(roles, found) -> tuple[list[Part], str]:
        """The recovery of each on held-out prompts."""
        start, teacher = name(roles.start), name(roles.teacher)
        if not wide_gaps(start, {roles.domain: teacher}, found)[0]:
            return [], f"the teacher's gap over the start is below .10 on {roles.domain}"
        opd, sft = (recovery(name(r), start, teacher, roles.domain) for r in (roles.opd, roles.sft))
        return [
            Part("recovery, OPD", opd, least=0.7, delta=DELTA_RECOVERY),
            Part("recovery, SFT", sft, most=0.2, delta=DELTA_RECOVERY),
        ], ""
