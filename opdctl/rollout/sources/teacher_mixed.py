"""Each token from a mixture of teacher and student: alpha q + (1 - alpha) p.

MiniLLM (arXiv 2306.08543): it keeps the student from samples that degenerate, which its reward
would take for good. The log-probs kept are the mixture's, so a gate with the ratio of trainer to
sampler is the paper's importance weight p(y_t) / mixture(y_t), which takes each token's own ratio
for the product of all before it. Both models are read for every token, which the transformers
engine alone does.

    opdctl stage opd --student DIR --teacher math=DIR --method minillm
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.references import parse
from opdctl.config.schema import key
from opdctl.config.settings import routes
from opdctl.errors import Problem
from opdctl.rollout.prompts import PromptOrder
from opdctl.rollout.sampling import sample_group


class TeacherMixed:
    """Every token drawn from alpha x teacher + (1 - alpha) x student (MiniLLM)."""

    revision = 1
    samples_from = "mixture"
    has_logprobs = True
    engines = ("transformers",)

    @dataclass(kw_only=True)
    class Config:
        """Keys of teacher_mixed."""

        alpha: float = key(0.2, "the teacher's share in every token", least=0, most=0.99)

    @staticmethod
    def student_share(config) -> float:
        """Share of the rollouts that the student samples: none, unless alpha is 0."""
        return float(config.alpha == 0)

    @staticmethod
    def problems(config, stage) -> list[Problem]:
        """No teacher to mix in, or several."""
        if not stage.teachers:
            return [Problem("", "the stage has no teachers", "teachers: {DOMAIN: REF}")]
        served = [n for n, t in stage.teachers.items() if parse(t.model).form == "server"]
        if served:
            what = f"{served[0]} is behind a server and cannot be mixed in token by token"
            return [Problem("", what, "a stage, a folder or a public name")]
        if stage.pooled:
            return [Problem("", "nothing says which pooled teacher is mixed in", "pooled=false")]
        return []

    def __init__(self, config, ctx, model) -> None:
        self.config, self.ctx, self.model, self.parameters = config, ctx, model, 0.0
        self.routes = routes(ctx.recipe.domains(ctx.name), ctx.config.teachers)
        self.order = PromptOrder(ctx, model)

    def draw(self, step: int):
        """All rollouts of a step: ``per_step`` prompts x ``samples``."""
        by_teacher: dict[str, list] = {}
        for prompt in self.order.at(step):
            by_teacher.setdefault(self.routes[prompt.domain][0], []).append(prompt)
        rollouts, flops = [], 0.0
        for name, prompts in by_teacher.items():
            teacher = self.ctx.frozen(self.ctx.config.teachers[name].model)
            blend = (teacher, self.config.alpha)
            found = sample_group(self.ctx, self.model, prompts, step, "mixture", blend=blend)
            first = 1 + max((r.group for r in rollouts), default=-1)
            for rollout in found:
                rollout.group += first
            size = self.model.parameters + teacher.parameters
            flops += size * sum(r.forwarded for r in found)
            rollouts += found
        self.sampled = sum(r.forwarded for r in rollouts)
        self.parameters = flops / max(1, self.sampled)
        return rollouts
