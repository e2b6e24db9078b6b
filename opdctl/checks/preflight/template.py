"""The teacher is shown the student's rendered prompt; would it have rendered it so itself?

Real prompts of the stage are rendered by both tokenizers and compared id by id; where a domain has
an environment, so is what stands between two turns. Templates that differ in text alone are fine.
"""

from __future__ import annotations

from opdctl.checks.preflight._pairing import Pairing
from opdctl.types import Finding

RENDERED = 16  # prompts of each domain


class Template:
    """Both sides render the stage's prompts to the same ids."""

    revision = 1
    samples = False
    why = (
        "a teacher shown a prompt in a format it was not trained on is off by .29 nats a token, "
        "and the student ends below its SFT start "
        "(github.com/thinking-machines-lab/tinker-cookbook/issues/796)"
    )

    def look(self, pairing: Pairing) -> list[Finding]:
        """One finding a teacher: the first prompt that differs, and where."""
        return [self._one(pairing, name) for name in pairing.teachers]

    def _one(self, pairing: Pairing, name: str) -> Finding:
        student, teacher = pairing.student, pairing.outline(name)
        count = 0
        for domain in pairing.domains(name):
            shown = [("prompt", p.text, "", p) for p in pairing.prompts(domain, RENDERED)]
            environment = pairing.ctx.environment(domain)
            if environment:
                role = environment.role
                shown.append((f"{role} turn", environment.refusal, role, shown[0][3]))
            for what, text, role, prompt in shown:
                ours, theirs = (
                    m.observation(text, role, student.end_of_turn, prompt)
                    if role
                    else m.render(prompt)
                    for m in (student, teacher)
                )
                count += 1
                if ours != theirs:
                    told = difference(student.tokenizer, ours, theirs)
                    return Finding(
                        "error",
                        f"the {what} {text[:40]!r} of {domain} is rendered differently: {told}",
                        _mend(pairing, name),
                        name,
                    )
        return Finding("ok", f"{count} texts are rendered to the same ids", teacher=name)


def _mend(pairing: Pairing, name: str) -> str:
    taken = f"prompt the student by the teacher's: template={pairing.teachers[name]}"
    copied = (
        "give both the same chat_template: copy the teacher's chat_template.jinja beside the "
        "student's tokenizer"
    )
    how = taken if hasattr(pairing.ctx.config, "template") else copied
    return f"{how}, or train the student on it first (sft)"


def difference(tokenizer, ours: list[int], theirs: list[int]) -> str:
    """Where two renderings part, and how each goes on."""
    place = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    rests = [tokenizer.convert_ids_to_tokens(ids[place : place + 4]) for ids in (ours, theirs)]
    return f"from id {place} on the student has {rests[0]}, the teacher {rests[1]}"
