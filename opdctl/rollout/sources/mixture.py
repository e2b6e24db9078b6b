"""Rollouts of the student, of its teachers and of the data, each in its share.

Each prompt of a step is assigned to one of them by a draw. GKD (arXiv 2306.13649): its lambda is
the student's share, the rest is data. DAgger (Ross et al. 2011, arXiv 1011.0686): its beta is the
teacher's share, which decays from step to step; here a whole response, not each token, comes from
one of them, which is our choice. The teacher's share at 1 is sequence-level distillation (arXiv
1606.07947). Teachers are those of the stage, by domain; their responses are trained on unverified.
The samplers' log-probs are not kept: an objective over the student's own samples is refused.

    opdctl stage opd --student DIR --teacher math=DIR --method gkd sources.mixture.student=1 ...
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl import draws
from opdctl.config.references import parse
from opdctl.config.registry import config_of, member
from opdctl.config.schema import key
from opdctl.config.settings import SourceConfig, routes
from opdctl.errors import Problem
from opdctl.rollout.prompts import PromptOrder
from opdctl.rollout.sampling import sample_group
from opdctl.rollout.sources._source import Source


class Mixture(Source):
    """Each prompt to the student, its teacher or the data, by given shares (GKD, DAgger)."""

    revision = 1  # to be raised with that of dataset too, which only this one names
    samples_from = "mixture"
    in_opd = True

    @dataclass(kw_only=True)
    class Config(SourceConfig):
        """The keys of mixture. The shares sum to 1."""

        student: float = key(0.5, "share of prompts the student answers", least=0, most=1)
        teacher: float = key(0.0, "share the teacher of the domain answers", least=0, most=1)
        dataset: float = key(0.5, "share whose reference answer is shown", least=0, most=1)
        decay: float = key(
            1.0,
            "the teacher's share is times this after each step, for the student",
            least=0,
            most=1,
        )

    @staticmethod
    def student_share(config) -> float:
        """Return the share of the student's rollouts; with a decay, the mean of first and last."""
        return config.student + (config.teacher / 2 if config.decay < 1 else 0)

    @staticmethod
    def problems(config, stage) -> list[Problem]:
        """Return shares that do not sum to 1, and a teacher's share that no teacher can fill."""
        wrong, total = [], config.student + config.teacher + config.dataset
        if abs(total - 1) > 1e-9:
            wrong.append(Problem("", f"the shares sum to {total:g}", "student=.5 dataset=.5"))
        if config.decay != 1 and not config.teacher:
            wrong.append(Problem("decay", "the teacher has no share to decay", "decay=1"))
        if config.teacher and not stage.teachers:
            wrong.append(Problem("teacher", "the stage has no teachers", "teachers: {DOMAIN: REF}"))
        served = [n for n, t in stage.teachers.items() if parse(t.model).form == "server"]
        if config.teacher and served:
            message = f"{served[0]} is behind a server, which scores and does not answer here"
            wrong.append(Problem("teacher", message, "a stage, a folder or a public name"))
        if config.teacher and stage.pooled:
            message = "with pooled teachers nothing says which of them answers"
            wrong.append(Problem("teacher", message, "pooled=false"))
        return wrong

    def __init__(self, config, ctx, model) -> None:
        self.config, self.seed = config, ctx.seed
        self.order = PromptOrder(ctx, model)
        self.samplers = {}
        if config.student or config.decay < 1:
            self.samplers["student"] = member("sources", "student")(None, ctx, model)
        if config.teacher:
            self.samplers["teacher"] = TeacherSamples(ctx, model)
        if config.dataset:
            keys = config_of("sources", "dataset")
            self.samplers["dataset"] = member("sources", "dataset")(keys, ctx, model)
        for name, source in self.samplers.items():
            source.order = self.order.subset(lambda step, name=name: self.assignment(step)[name])

    @property
    def sources(self) -> list:
        """The sources that have a share."""
        return list(self.samplers.values())

    def assignment(self, step: int) -> dict[str, list[int]]:
        """Assign each prompt of a step, by its place, to the student, the teacher or the data."""
        teacher = self.config.teacher * self.config.decay ** max(0, step)
        places: dict[str, list[int]] = {"student": [], "teacher": [], "dataset": []}
        for place in range(len(self.order.at(step))):
            u = draws.unit(self.seed, "mixture", step, place)
            source = "teacher" if u < teacher else "student"
            if teacher <= u < teacher + self.config.dataset:
                source = "dataset"
            places[source].append(place)
        return places

    def draw(self, step: int):
        """Return the rollouts of all, groups numbered through, without the samplers' log-probs."""
        rollouts: list = []
        for source in self.samplers.values():
            first = 1 + max((r.group for r in rollouts), default=-1)
            for rollout in source.draw(step):
                rollout.group += first
                rollout.behaviour_logprobs = None
                rollouts.append(rollout)
        return rollouts


class TeacherSamples(Source):
    """The samples of the stage's teachers, each for its domains, under the student's prompt."""

    samples_from = "teacher"
    order: PromptOrder  # set by the mixture

    def __init__(self, ctx, model) -> None:
        self.ctx, self.model, self.parameters = ctx, model, 0.0
        self.routes = routes(ctx.recipe.domains(ctx.name), ctx.config.teachers)

    def draw(self, step: int):
        """Return the samples of a step's prompts that are the teachers'."""
        by_teacher: dict[str, list] = {}
        for prompt in self.order.at(step):
            by_teacher.setdefault(self.routes[prompt.domain][0], []).append(prompt)
        rollouts, flops = [], 0.0
        for name, prompts in by_teacher.items():
            teacher = self.ctx.models.frozen(self.ctx.config.teachers[name].model)
            samples = sample_group(self.ctx, teacher, prompts, step, "teacher")
            first = 1 + max((r.group for r in rollouts), default=-1)
            for rollout in samples:
                rollout.group += first
                rollout.prompt_ids = self.model.render(rollout.prompt)
            flops += teacher.parameters * sum(r.forwarded for r in samples)
            rollouts += samples
        self.sampled = sum(r.forwarded for r in rollouts)
        self.parameters = flops / max(1, self.sampled)
        return rollouts
