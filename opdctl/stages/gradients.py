"""The gradients of several objectives on the same rollouts, measured and not applied.

DeepSeek-V4 (arXiv 2606.19348) says that the sampled-token estimate of the reverse KL has a high
variance and takes the full vocabulary instead. Here both are computed on the same batches of the
student's own rollouts: the trace variance of each and the cosine of their means. Logits rebuilt
from cached hidden rows are compared with the teacher's own. With ``together`` the sum is measured
too, which an opd stage of these keys would descend, with its reference, source and temperature.
Everything that acts between steps (several updates, minibatches) is left out: nothing is trained.

    opdctl stage gradients --student FOLDER --teacher math=FOLDER data.math.kind=...
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.registry import config_of, member
from opdctl.config.schema import REQUIRED, key
from opdctl.config.settings import Lora, Prompts, Sampling, StageConfig, Teacher
from opdctl.errors import Problem
from opdctl.stages._stage import Stage


class Gradients(Stage):
    """Variance of each objective's gradient on the same rollouts, and cosines of their means."""

    revision = 1
    writes = ""
    uses = ("stages/opd", "sources/student", "engines/transformers", "teachers/local")

    @dataclass(kw_only=True)
    class Config(StageConfig):
        """The keys of a gradients stage."""

        student: str = key(REQUIRED, "whose rollouts, whose gradient", ref=True)
        lora: Lora = key(Lora(), "gradients of an adapter, not of the weights", neutral=True)
        batches: int = key(100, "gradients of each objective", least=2)
        prompts: Prompts = key(Prompts(), "which prompts, of each batch")
        sampling: Sampling = key(Sampling(), "how the student samples")
        teachers: dict[str, Teacher] = key({}, "NAME: a reference, or {model, serves, weight}")
        pooled: bool = key(False, "all teachers of a domain on every sample; else one each")
        signals: dict = key({"reverse_kl": {}}, "what the advantage is made of", family="signals")
        objectives: dict = key(
            {"policy_gradient": {}, "divergence": {}},
            "those compared; the sampled token and the full vocabulary",
            family="objectives",
        )
        reference: str | None = key(
            None, "frozen model that a signal measures from", ref=True, neutral=True
        )
        sources: dict = key(
            {}, "where responses come from; empty is the student", family="sources", neutral=True
        )
        loss_temperature: float = key(
            0.0, "divides the logits in the loss; 0 is as sampled", least=0.0, neutral=True
        )
        together: bool = key(
            False,
            "their sum too, which is what an opd stage of these keys descends",
            neutral=True,
        )
        seed_group: str = key("", "stages with one name here share prompts and draws")

    @staticmethod
    def problems(config, recipe, stage):
        """Return what an opd stage of these keys would refuse, and what cannot be measured."""
        alone = not config.together
        problems = member("stages", "opd").problems(as_opd(config), recipe, stage, alone)
        if config.lora.output == "adapter":
            problems.append(Problem("lora.output", "nothing is written here", "leave it out"))
        if sum(o.coef > 0 for o in config.objectives.values()) < 1 + alone:
            hint = "objectives: {policy_gradient: {}, divergence: {}}, or together: true for one"
            problems.append(Problem("objectives", "fewer than two to compare", hint))
        for name in config.objectives:
            if member("objectives", name).fitted:
                message = "is fitted before a first step, and nothing is trained here"
                problems.append(Problem(f"objectives.{name}", message, "leave it out"))
        return problems

    def run(self, ctx):
        """Sample, score, and take each objective's gradient, batch by batch."""
        from opdctl.train.assemble import on_policy
        from opdctl.train.gradients import measure

        config = ctx.config
        model = ctx.models.student()
        return measure(ctx, model, on_policy(ctx, model, config.teachers))


def as_opd(config):
    """Return the keys of an opd stage that would make one step with these keys."""
    shared = ("student", "prompts", "sampling", "teachers", "pooled", "signals", "objectives")
    shared += ("reference", "sources", "loss_temperature")
    return config_of("stages", "opd", kind="opd", **{n: getattr(config, n) for n in shared})
