"""Rollouts of the student, of its teachers and of the data, each in its share.

Each prompt of a step is given to one of them by a draw of its own. GKD (arXiv 2306.13649): its
lambda is the share of the student, the rest is data. DAgger (Ross et al. 2011, arXiv 1011.0686):
its beta is the teacher's share, which decays from step to step; that a whole response is of one of
them, not each token, is ours. All of the teacher is sequence-level distillation (arXiv 1606.07947).
Teachers are those of the stage, by domain; what they write is trained on as written, unverified.
Log-probs of the samplers are not kept: an objective over the student's own samples is refused.

    opdctl stage opd --student DIR --teacher math=DIR --method gkd sources.mixture.student=1 ...
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl import draws
from opdctl.config.references import parse
from opdctl.config.registry import config_of, member
from opdctl.config.schema import key
from opdctl.config.settings import routes
from opdctl.errors import Problem
from opdctl.rollout.prompts import PromptOrder
from opdctl.rollout.sampling import sample_group


class Mixture:
    """Each prompt to the student, its teacher or the data, by given shares (GKD, DAgger)."""

    revision = 1  # to be raised with that of dataset too, which only this one names
    samples_from = "mixture"
    has_logprobs = False

    @dataclass(kw_only=True)
    class Config:
        """Keys of mixture. The shares sum to 1."""

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
        """Share of the rollouts that the student samples: between first and last, if it changes."""
        return config.student + (config.teacher / 2 if config.decay < 1 else 0)

    @staticmethod
    def problems(config, stage) -> list[Problem]:
        """Shares that are not shares, and a teacher's that nothing can fill."""
        found, total = [], config.student + config.teacher + config.dataset
        if abs(total - 1) > 1e-9:
            found.append(Problem("", f"the shares sum to {total:g}", "student=.5 dataset=.5"))
        if config.decay != 1 and not config.teacher:
            found.append(Problem("decay", "the teacher has no share to decay", "decay=1"))
        if config.teacher and not stage.teachers:
            found.append(Problem("teacher", "the stage has no teachers", "teachers: {DOMAIN: REF}"))
        served = [n for n, t in stage.teachers.items() if parse(t.model).form == "server"]
        if config.teacher and served:
            what = f"{served[0]} is behind a server, which scores and does not answer here"
            found.append(Problem("teacher", what, "a stage, a folder or a public name"))
        if config.teacher and stage.pooled:
            what = "with pooled teachers nothing says which of them answers"
            found.append(Problem("teacher", what, "pooled=false"))
        return found

    def __init__(self, config, ctx, model) -> None:
        self.config, self.seed = config, ctx.seed
        self.order = PromptOrder(ctx, model)
        self.parts = {}
        if config.student or config.decay < 1:
            self.parts["student"] = member("sources", "student")(None, ctx, model)
        if config.teacher:
            self.parts["teacher"] = TeacherCache(ctx, model)
        if config.dataset:
            keys = config_of("sources", "dataset")
            self.parts["dataset"] = member("sources", "dataset")(keys, ctx, model)
        for name, source in self.parts.items():
            source.order = self.order.chosen(lambda step, name=name: self.places(step)[name])

    @property
    def sources(self) -> list:
        """For the ledger."""
        return list(self.parts.values())

    def places(self, step: int) -> dict[str, list[int]]:
        """Places of a step's prompts that student, teacher and data answer."""
        teacher = self.config.teacher * self.config.decay ** max(0, step)
        found: dict[str, list[int]] = {"student": [], "teacher": [], "dataset": []}
        for place in range(len(self.order.at(step))):
            u = draws.unit(self.seed, "mixture", step, place)
            who = "teacher" if u < teacher else "student"
            if teacher <= u < teacher + self.config.dataset:
                who = "dataset"
            found[who].append(place)
        return found

    def draw(self, step: int):
        """What each draws, groups numbered through, without the samplers' log-probs."""
        rollouts: list = []
        for source in self.parts.values():
            first = 1 + max((r.group for r in rollouts), default=-1)
            for rollout in source.draw(step):
                rollout.group += first
                rollout.behaviour_logprobs = None
                rollouts.append(rollout)
        return rollouts


class TeacherCache:
    """Samples of the stage's teachers, each for its domains, under the student's prompt."""

    samples_from = "teacher"

    def __init__(self, ctx, model) -> None:
        self.ctx, self.model, self.parameters = ctx, model, 0.0
        self.routes = routes(ctx.recipe.domains(ctx.name), ctx.config.teachers)

    def draw(self, step: int):
        by_teacher: dict[str, list] = {}
        for prompt in self.order.at(step):
            by_teacher.setdefault(self.routes[prompt.domain][0], []).append(prompt)
        rollouts, flops = [], 0.0
        for name, prompts in by_teacher.items():
            teacher = self.ctx.frozen(self.ctx.config.teachers[name].model)
            found = sample_group(self.ctx, teacher, prompts, step, "teacher")
            first = 1 + max((r.group for r in rollouts), default=-1)
            for rollout in found:
                rollout.group += first
                rollout.prompt_ids = self.model.render(rollout.prompt)
            flops += teacher.parameters * sum(r.forwarded for r in found)
            rollouts += found
        self.sampled = sum(r.forwarded for r in rollouts)
        self.parameters = flops / max(1, self.sampled)
        return rollouts
