"""Test that the teacher's chat template renders a prompt as the student's does.

The teacher is shown the prompt as the student renders it. Real prompts of the stage are rendered by
both tokenizers and compared id by id; where a domain has an environment, so are the tokens between
two turns. Templates that differ in their source text only are fine.
"""

from __future__ import annotations

from opdctl.checks.preflight._checked_stage import CheckedStage
from opdctl.config.schema import has_key
from opdctl.protocols import Check
from opdctl.types import Finding

RENDERED = 16  # prompts of each domain


class Template(Check):
    """Both sides render the stage's prompts to the same ids."""

    revision = 1
    samples = False
    why = (
        "a teacher shown a prompt in a format it was not trained on is off by .29 nats a token, "
        "and the student ends below its SFT start "
        "(github.com/thinking-machines-lab/tinker-cookbook/issues/796)"
    )

    def findings(self, stage: CheckedStage) -> list[Finding]:
        """Return one finding for each teacher: the first prompt that differs, and where."""
        return [self._finding(stage, name) for name in stage.teachers]

    def _finding(self, stage: CheckedStage, name: str) -> Finding:
        student, teacher = stage.student, stage.outline(name)
        count = 0
        for domain in stage.domains(name):
            shown = [("prompt", p.text, "", p) for p in stage.prompts(domain, RENDERED)]
            environment = stage.ctx.prompts.environment(domain)
            if environment:
                role = environment.role
                shown.append((f"{role} turn", environment.refusal, role, shown[0][3]))
            for kind, text, role, prompt in shown:
                ours, theirs = (
                    m.observation(text, role, student.end_of_turn, prompt)
                    if role
                    else m.render(prompt)
                    for m in (student, teacher)
                )
                count += 1
                if ours != theirs:
                    where = difference(student.tokenizer, ours, theirs)
                    return Finding(
                        "error",
                        f"the {kind} {text[:40]!r} of {domain} is rendered differently: {where}",
                        _mend(stage, name),
                        name,
                    )
        return Finding("ok", f"{count} texts are rendered to the same ids", teacher=name)


def _mend(stage: CheckedStage, name: str) -> str:
    taken = f"prompt the student by the teacher's: template={stage.teachers[name]}"
    copied = (
        "give both the same chat_template: copy the teacher's chat_template.jinja beside the "
        "student's tokenizer"
    )
    how = taken if has_key(stage.ctx.config, "template") else copied
    return f"{how}, or train the student on it first (sft)"


def difference(tokenizer, ours: list[int], theirs: list[int]) -> str:
    """Describe where two renderings part, and how each goes on."""
    place = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    rests = [tokenizer.convert_ids_to_tokens(ids[place : place + 4]) for ids in (ours, theirs)]
    return f"from id {place} on the student has {rests[0]}, the teacher {rests[1]}"
