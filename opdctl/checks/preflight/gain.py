"""Is the teacher better than the student at what it is to teach?

Both answer the same training prompts with the same draws, once each; the verifier judges. The
interval is of the paired differences, over prompts. A teacher may have something to teach that the
verifier does not see, so only one that is worse with its whole interval is an error.
"""

from __future__ import annotations

from opdctl.checks.preflight._pairing import Pairing
from opdctl.train.metrics import mean
from opdctl.types import Finding


class Gain:
    """Each teacher is more accurate than the student on a sample of its prompts."""

    revision = 1
    samples = True
    why = (
        "OPD moves a student to its teacher's distribution whatever its score: one that had been "
        "trained by RL fell back to where it came from (arXiv 2604.13016); which gap it takes is "
        "asked in github.com/NVIDIA-NeMo/RL/issues/1527"
    )

    def look(self, pairing: Pairing) -> list[Finding]:
        """One finding for each teacher and domain, but for a teacher that is the student, and one
        behind a server where an environment would answer it."""
        return [
            self._one(pairing, name, domain)
            for name in (*pairing.differing, *pairing.reached)
            for domain in pairing.domains(name)
            if name in pairing.teachers or not pairing.ctx.environment(domain)
        ]

    def _one(self, pairing: Pairing, name: str, domain: str) -> Finding:
        found = paired(pairing, name, domain)
        low, high = found["ci95"]
        what = (
            f"{domain}: teacher {found['teacher']:.2f}, student {found['student']:.2f}, gain "
            f"{found['gain']:+.2f} [{low:+.2f}, {high:+.2f}] on {found['prompts']} prompts"
        )
        if low > 0:
            return Finding("ok", what, teacher=name)
        if high < 0:
            do = "another teacher for this domain, or policy to keep it as it is"
            return Finding("error", f"{what}: worse", do, name)
        do = "train the teacher further, or leave it: what it teaches may not be what is verified"
        if not found["teacher"]:
            do = "look at what it answers: the verifier, the format, or sampling.max_tokens"
        return Finding("warning", f"{what}: not shown to be better", do, name)


def paired(pairing: Pairing, name: str, domain: str) -> dict:
    """Accuracy of student and teacher on the same prompts of a domain, the mean difference with its
    95 % interval, and ``right``: the verdicts of both, a pair for each prompt."""
    from opdctl.train.evaluation import half_width

    student, teacher = (
        pairing.ctx.verify([r for r in rollouts if r.prompt.domain == domain])
        for rollouts in (pairing.rollouts, pairing.answers(name))
    )
    right = list(zip(student, teacher, strict=True))
    gaps = [t - s for s, t in right]
    n, centre = len(gaps), mean(gaps)
    half = half_width(gaps) if n > 1 else 1.0
    return {
        "student": mean(student),
        "teacher": mean(teacher),
        "gain": centre,
        "ci95": [centre - half, centre + half],
        "prompts": n,
        "right": right,
    }
