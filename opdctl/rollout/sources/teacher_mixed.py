"""Tokens sampled from a mixture of teacher and student: alpha q + (1 - alpha) p.

MiniLLM (arXiv 2306.08543): the mixture keeps the student from degenerate samples that the reward
would rate as good. The log-probs kept are the mixture's, so a gate by the ratio of trainer to
sampler is the paper's importance weight p(y_t) / mixture(y_t), which replaces the product of all
ratios before a token by the token's own. Both models run for every token, which only the
transformers engine does.

    opdctl stage opd --student DIR --teacher math=DIR --method minillm
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.references import parse
from opdctl.config.schema import key
from opdctl.config.settings import SourceConfig, routes
from opdctl.errors import Problem
from opdctl.rollout.prompts import PromptOrder
from opdctl.rollout.sampling import sample_group
from opdctl.rollout.sources._source import Source


class TeacherMixed(Source):
    """Every token drawn from alpha x teacher + (1 - alpha) x student (MiniLLM)."""

    revision = 1
    samples_from = "mixture"
    has_logprobs = True
    in_opd = True
    engines = ("transformers",)

    @dataclass(kw_only=True)
    class Config(SourceConfig):
        """The keys of teacher_mixed."""

        alpha: float = key(0.2, "the teacher's share in every token", least=0, most=0.99)

    @staticmethod
    def student_share(config) -> float:
        """Return the share of rollouts that the student samples: none, unless alpha is 0."""
        return float(config.alpha == 0)

    @staticmethod
    def problems(config, stage) -> list[Problem]:
        """Return a problem if there is no teacher to mix in, or several."""
        if not stage.teachers:
            return [Problem("", "the stage has no teachers", "teachers: {DOMAIN: REF}")]
        served = [n for n, t in stage.teachers.items() if parse(t.model).form == "server"]
        if served:
            message = f"{served[0]} is behind a server and cannot be mixed in token by token"
            return [Problem("", message, "a stage, a folder or a public name")]
        if stage.pooled:
            return [Problem("", "nothing says which pooled teacher is mixed in", "pooled=false")]
        return []

    def __init__(self, config, ctx, model) -> None:
        self.config, self.ctx, self.model, self.parameters = config, ctx, model, 0.0
        self.routes = routes(ctx.recipe.domains(ctx.name), ctx.config.teachers)
        self.order = PromptOrder(ctx, model)

    def draw(self, step: int):
        """Return all rollouts of a step: ``per_step`` prompts x ``samples``."""
        by_teacher: dict[str, list] = {}
        for prompt in self.order.at(step):
            by_teacher.setdefault(self.routes[prompt.domain][0], []).append(prompt)
        rollouts, flops = [], 0.0
        for name, prompts in by_teacher.items():
            teacher = self.ctx.models.frozen(self.ctx.config.teachers[name].model)
            blend = (teacher, self.config.alpha)
            samples = sample_group(self.ctx, self.model, prompts, step, "mixture", blend=blend)
            first = 1 + max((r.group for r in rollouts), default=-1)
            for rollout in samples:
                rollout.group += first
            size = self.model.parameters + teacher.parameters
            flops += size * sum(r.forwarded for r in samples)
            rollouts += samples
        self.sampled = sum(r.forwarded for r in rollouts)
        self.parameters = flops / max(1, self.sampled)
        return rollouts
