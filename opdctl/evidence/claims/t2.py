"""T2, Thinking Machines: one prompt, sampled often, is nearly enough for OPD."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import DELTA_RECOVERY, Condition, recovery, stage_name, wide_gaps
from opdctl.protocols import Claim


class T2(Claim):
    """One prompt with many rollouts teaches nearly everything; imitation of it teaches nothing."""

    revision = 1
    statement = "one prompt, many rollouts is nearly enough"
    source = "Thinking Machines, On-Policy Distillation"
    reported = "20 steps x 256 rollouts of one prompt: about the teacher's AIME'24"
    threshold = "recovery >= .7 on held-out prompts; SFT on that prompt <= .2"

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        opd: str = key(REQUIRED, "the student of OPD on one prompt", ref=True)
        sft: str = key(REQUIRED, "the student of SFT on it", ref=True)
        start: str = key(REQUIRED, "the start of both", ref=True)
        teacher: str = key(REQUIRED, "the teacher", ref=True)
        domain: str = key(REQUIRED, "domain", domains=True)

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the recovery of each on held-out prompts."""
        start, teacher = stage_name(roles.start), stage_name(roles.teacher)
        if not wide_gaps(start, {roles.domain: teacher}, runs)[0]:
            return [], f"the teacher's gap over the start is below .10 on {roles.domain}"
        opd, sft = (
            recovery(stage_name(r), start, teacher, roles.domain) for r in (roles.opd, roles.sft)
        )
        return [
            Condition("recovery, OPD", opd, least=0.7, delta=DELTA_RECOVERY),
            Condition("recovery, SFT", sft, most=0.2, delta=DELTA_RECOVERY),
        ], ""
