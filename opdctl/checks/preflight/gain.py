"""Test that each teacher is better than the student on the domains it serves.

Both answer the same training prompts with the same draws, once each; the verifier judges. The
interval is Newcombe's for paired verdicts. A teacher may have something to teach that
the verifier does not see, so it is an error only where the whole interval lies below zero.
"""

from __future__ import annotations

from opdctl.checks.preflight._checked_stage import CheckedStage
from opdctl.intervals import newcombe
from opdctl.protocols import Check
from opdctl.train.metrics import mean
from opdctl.types import Finding


class Gain(Check):
    """Each teacher is more accurate than the student on a sample of its prompts."""

    revision = 1
    samples = True
    why = (
        "OPD moves a student to its teacher's distribution whatever its score: one that had been "
        "trained by RL fell back to where it came from (arXiv 2604.13016); which gap it takes is "
        "asked in github.com/NVIDIA-NeMo/RL/issues/1527"
    )

    def findings(self, stage: CheckedStage) -> list[Finding]:
        """Return one finding for each teacher and domain.

        Left out: a teacher that is the student, and a domain with an environment of a served
        teacher, since a server cannot be answered by an environment.
        """
        return [
            self._finding(stage, name, domain)
            for name in (*stage.differing, *stage.answering)
            for domain in stage.domains(name)
            if name in stage.teachers or not stage.ctx.prompts.environment(domain)
        ]

    def _finding(self, stage: CheckedStage, name: str, domain: str) -> Finding:
        accuracy = paired_accuracy(stage, name, domain)
        low, high = accuracy["ci95"]
        message = (
            f"{domain}: teacher {accuracy['teacher']:.2f}, student {accuracy['student']:.2f}, gain "
            f"{accuracy['gain']:+.2f} [{low:+.2f}, {high:+.2f}] on {accuracy['prompts']} prompts"
        )
        if low > 0:
            return Finding("ok", message, teacher=name)
        if high < 0:
            do = "another teacher for this domain, or policy to keep it as it is"
            return Finding("error", f"{message}: worse", do, name)
        do = "train the teacher further, or leave it: what it teaches may not be what is verified"
        if not accuracy["teacher"]:
            do = "look at what it answers: the verifier, the format, or sampling.max_tokens"
        return Finding("warning", f"{message}: not shown to be better", do, name)


def paired_accuracy(stage: CheckedStage, name: str, domain: str) -> dict:
    """Return the accuracies of student and teacher on the same prompts of a domain.

    Keys: ``student``, ``teacher``; ``gain`` and ``ci95``, the mean difference and its 95 %
    interval; ``prompts``, how many; ``right``, a tuple of both verdicts for each prompt.
    """
    student, teacher = (
        stage.ctx.verdicts.verify([r for r in rollouts if r.prompt.domain == domain])
        for rollouts in (stage.rollouts, stage.answers(name))
    )
    right = list(zip(student, teacher, strict=True))
    return {
        "student": mean(student),
        "teacher": mean(teacher),
        "gain": mean(t - s for s, t in right),
        "ci95": newcombe(right),
        "prompts": len(right),
        "right": right,
    }
