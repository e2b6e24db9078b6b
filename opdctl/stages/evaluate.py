"""The accuracy of one model on held-out prompts of every domain: mean@n, pass@k, length.

All models of a run get the same prompts and the same names of draws. pass@k is the unbiased
estimator of Chen et al. 2021 (arXiv 2107.03374); the interval is over prompts, so several
samples of one prompt do not count as independent.

    opdctl stage evaluate --student FOLDER data.math.kind=jsonl data.math.path=test.jsonl
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.config.settings import PromptKeys, Sampling, StageConfig
from opdctl.errors import Problem
from opdctl.stages._stage import Stage


@dataclass(kw_only=True)
class HeldOut(PromptKeys):
    """The keys of the held-out prompts."""

    domains: dict[str, float] = key({}, "domains, each with any number above 0; empty is all")
    limit: int = key(500, "most prompts of a domain", least=1)
    samples: int = key(4, "responses per prompt", least=1)


class Evaluate(Stage):
    """mean@n, pass@k, 95 % interval and length of a model on every domain."""

    revision = 1
    writes = ""
    uses = ("engines/transformers",)

    @dataclass(kw_only=True)
    class Config(StageConfig):
        """The keys of an evaluate stage."""

        student: str = key(REQUIRED, "the model to evaluate", ref=True)
        prompts: HeldOut = key(HeldOut(), "which prompts")
        sampling: Sampling = key(Sampling(), "how it samples")
        seed_group: str = key("evaluate", "stages with one name here share their draws")

    @staticmethod
    def problems(config, recipe, stage):
        """Return what the schema cannot check of the stage's keys."""
        if recipe.domains(stage):
            return []
        return [
            Problem(
                "prompts.domains",
                "there is no data to evaluate on",
                "data.math.kind=jsonl data.math.path=FILE, or data: in the recipe",
            )
        ]

    def run(self, ctx):
        """Evaluate domain by domain; finished domains survive a kill."""
        from opdctl.train.evaluation import evaluate

        return evaluate(ctx)
