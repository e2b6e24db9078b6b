"""Outcome reward model: a scalar head on a language model, trained on rollouts with verdicts.

The verifier labels the rollouts; the model's probability that an answer is right can stand in for
the verifier later. MiMo-V2-Flash's "ORM"; token-level verifiers as in Cobbe et al. 2021 (arXiv
2110.14168). Leaves out pairwise preferences and generative judges. The output is a transformers
token classifier.

    opdctl run recipes/mimo.yaml --only orm
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.registry import config_of
from opdctl.config.schema import REQUIRED, key
from opdctl.config.settings import Lora, Prompts, Sampling, TrainConfig
from opdctl.errors import Problem
from opdctl.stages._stage import Stage
from opdctl.stages.sft import domain_problems


class Orm(Stage):
    """A model that predicts the verifier's verdict on a rollout."""

    revision = 1
    writes = "classifier"
    uses = ("sources/teacher", "engines/transformers", "rewards/verifier", "objectives/outcome")

    @dataclass(kw_only=True)
    class Config(TrainConfig):
        """The keys of an orm stage."""

        student: str = key(REQUIRED, "where its backbone starts", ref=True)
        lora: Lora = key(Lora(), "an adapter in place of the backbone's weights", neutral=True)
        policy: str = key(REQUIRED, "whose rollouts it learns to judge", ref=True)
        prompts: Prompts = key(Prompts(samples=4), "which prompts")
        sampling: Sampling = key(Sampling(), "how they are sampled")

    @staticmethod
    def problems(config, recipe, stage):
        """Return what the schema cannot check of the stage's keys."""
        problems = domain_problems(recipe, stage)
        if config.lora.output == "adapter":
            message = "its score is trained whole, and no adapter holds it"
            problems.append(Problem("lora.output", message, "lora.output=merged"))
        return problems

    def run(self, ctx):
        """Sample, label, train, write the classifier."""
        from opdctl.train.assemble import TrainSetup, reward_of, source_of, terms_of
        from opdctl.train.loop import train

        def setup(ctx, model):
            config = ctx.config
            judged = config_of(
                "sources", "teacher", model=config.policy, keep="all", sampling=config.sampling
            )
            return TrainSetup(
                source_of(ctx, model, {"teacher": judged}),
                terms_of({"outcome": config_of("objectives", "outcome")}),
                rewards=[reward_of(ctx, "verifier")],
            )

        return train(ctx, ctx.models.student(classifier=True), setup)
