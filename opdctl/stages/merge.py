"""Several models of one shape merged into one without training: the baselines of OPD.

    average           mean of the weights ("model soup", Wortsman et al., arXiv 2203.05482)
    task_arithmetic   student + scale x sum of (model - student) (Ilharco et al., arXiv 2212.04089)

Both are weighted by each model's ``weight``. Leaves out merges that look at signs or at single
layers (TIES, DARE).

    opdctl stage merge --student DIR models.a=DIR models.b=DIR method=task_arithmetic scale=0.4
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from opdctl.config.schema import REQUIRED, key
from opdctl.config.settings import StageConfig
from opdctl.errors import Problem
from opdctl.stages._stage import Stage


@dataclass(kw_only=True)
class Ingredient:
    """A model that is merged. ``NAME: REF`` is short for ``NAME: {model: REF}``."""

    short: ClassVar[str] = "model"
    model: str = key(REQUIRED, "stage:NAME, a folder or a public name", ref=True)
    weight: float = key(1.0, "its weight in the sum", least=0.0)


class Merge(Stage):
    """Weights of several models averaged, or their differences from one start added."""

    revision = 1
    writes = "model"
    uses = ()

    @dataclass(kw_only=True)
    class Config(StageConfig):
        """The keys of a merge stage."""

        student: str = key(REQUIRED, "the start that the models have in common", ref=True)
        models: dict[str, Ingredient] = key({}, "NAME: a reference, or {model, weight}")
        method: Literal["average", "task_arithmetic"] = key("average", "how they are merged")
        scale: float = key(1.0, "task_arithmetic: factor of the summed differences", least=0.0)

    @staticmethod
    def problems(config, recipe, stage):
        """Return what the schema cannot check of the stage's keys."""
        if sum(m.weight for m in config.models.values()):
            return []
        return [Problem("models", "no model with a weight above 0", "models: {math: stage:t_math}")]

    @staticmethod
    def notes(config):
        """Return keys that are allowed and have no effect."""
        if config.method == "average" and config.scale != 1.0:
            return [Problem("scale", "an average has no scale", "method=task_arithmetic")]
        return []

    def run(self, ctx):
        """Sum in float64, one model in memory beside the result; write the output.

        Raises:
            StageFailed: two models differ in shape or in tokens; names the weight.
        """
        import torch

        from opdctl.errors import StageFailed
        from opdctl.models import merging
        from opdctl.models.model import require_same_tokens
        from opdctl.train.checkpoint import commit
        from opdctl.types import Compute

        config = ctx.config
        student = ctx.models.load(config.student, device="cpu")
        own = merging.dense_weights(student)
        wide = merging.is_narrow(student.net) and merging.has_adapter(student.net)
        total = sum(m.weight for m in config.models.values())
        merged = {n: w.double().clone() for n, w in own.items() if w.is_floating_point()}
        for name, ingredient in config.models.items():
            ctx.check()
            model = ctx.models.load(ingredient.model, device="cpu")
            where = f"stages.{ctx.name}.models.{name}"
            require_same_tokens(student, model, where)
            factor = ingredient.weight * (config.scale if config.method != "average" else 1 / total)
            theirs = merging.dense_weights(model)
            wide |= merging.is_narrow(model.net) and merging.has_adapter(model.net)
            for n, weight in own.items():
                if n not in theirs or theirs[n].shape != weight.shape:
                    raise StageFailed(
                        f"{where}: {n} has another shape than the student's",
                        "merge models of one architecture; OPD takes teachers of any",
                    )
                if n in merged:
                    merged[n] += factor * (theirs[n].double() - weight.double())
        merging.unload(student.net)
        if wide:
            merging.widen(student.net)  # 16 bits would round away what an adapter adds
        merging.untie_head(student.net, merged)
        plain = student.net.state_dict()
        with torch.no_grad():
            for n, sum64 in merged.items():
                plain[n].copy_(sum64)
        commit(ctx.folder, student)
        return Compute()
