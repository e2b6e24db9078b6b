"""The gradients that several objectives would give on the same rollouts, measured, not applied.

DeepSeek-V4 (arXiv 2606.19348) says that the sampled-token estimate of the reverse KL has a high
variance and takes the full vocabulary instead. Here both are computed on the same batches of the
student's own rollouts: trace variance of each, cosine of their means. And whether logits rebuilt
from cached hidden rows are the teacher's own. With ``together`` it measures a composition: what an
opd stage of these keys would descend, its reference, source and temperature included. What acts
between steps (several updates, minibatches) is left out: nothing is trained.

    opdctl stage gradients --student FOLDER --teacher math=FOLDER data.math.kind=...
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.registry import config_of, member
from opdctl.config.schema import REQUIRED, key
from opdctl.config.settings import Lora, Prompts, Sampling, StageConfig, Teacher
from opdctl.errors import Problem


class Gradients:
    """Variance of each objective's gradient on the same rollouts, and cosines of their means."""

    revision = 1
    writes = ""
    uses = ("stages/opd", "sources/student", "engines/transformers", "teachers/local")

    @dataclass(kw_only=True)
    class Config(StageConfig):
        """Keys of a gradients stage."""

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
        """What the schema cannot see: what an opd stage of these keys would refuse."""
        alone = not config.together
        found = member("stages", "opd").problems(as_opd(config), recipe, stage, alone)
        if config.lora.output == "adapter":
            found.append(Problem("lora.output", "nothing is written here", "leave it out"))
        if sum(o.coef > 0 for o in config.objectives.values()) < 1 + alone:
            hint = "objectives: {policy_gradient: {}, divergence: {}}, or together: true for one"
            found.append(Problem("objectives", "fewer than two to compare", hint))
        for name in config.objectives:
            if hasattr(member("objectives", name), "fit"):
                what = "is fitted before a first step, and nothing is trained here"
                found.append(Problem(f"objectives.{name}", what, "leave it out"))
        return found

    def run(self, ctx):
        """Sample, score, and take each objective's gradient, batch by batch."""
        from opdctl.train.assemble import on_policy
        from opdctl.train.gradients import measure

        config = ctx.config
        model = ctx.student()
        return measure(ctx, model, on_policy(ctx, model, config.teachers))


def as_opd(config):
    """The opd stage with one step of these keys."""
    shared = ("student", "prompts", "sampling", "teachers", "pooled", "signals", "objectives")
    shared += ("reference", "sources", "loss_temperature")
    return config_of("stages", "opd", kind="opd", **{n: getattr(config, n) for n in shared})
