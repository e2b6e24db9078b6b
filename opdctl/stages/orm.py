"""Outcome reward model: a scalar head on a language model, trained on rollouts that the verifier
has labelled. Its probability that an answer is right can stand in for the verifier later.

MiMo-V2-Flash's "ORM"; token-level verifiers as in Cobbe et al. 2021 (arXiv 2110.14168). Leaves
out pairwise preferences and generative judges. The output is a transformers token classifier.

    opdctl run recipes/mimo.yaml --only orm
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.registry import config_of
from opdctl.config.schema import REQUIRED, key
from opdctl.config.settings import Lora, Prompts, Sampling, TrainConfig
from opdctl.errors import Problem
from opdctl.stages.sft import needs_domains


class Orm:
    """A model that predicts the verifier's verdict on a rollout."""

    revision = 1
    writes = "classifier"
    uses = ("sources/teacher", "engines/transformers", "rewards/verifier", "objectives/outcome")

    @dataclass(kw_only=True)
    class Config(TrainConfig):
        """Keys of an orm stage."""

        student: str = key(REQUIRED, "where its backbone starts", ref=True)
        lora: Lora = key(Lora(), "an adapter in place of the backbone's weights", neutral=True)
        policy: str = key(REQUIRED, "whose rollouts it learns to judge", ref=True)
        prompts: Prompts = key(Prompts(samples=4), "which prompts")
        sampling: Sampling = key(Sampling(), "how they are sampled")

    @staticmethod
    def problems(config, recipe, stage):
        """What the schema cannot see."""
        found = needs_domains(recipe, stage)
        if config.lora.output == "adapter":
            what = "its score is trained whole, and no adapter holds it"
            found.append(Problem("lora.output", what, "lora.output=merged"))
        return found

    def run(self, ctx):
        """Sample, label, train, write the classifier."""
        from opdctl.train.assemble import TrainSetup, reward_of, source_of, terms_of
        from opdctl.train.loop import train

        def parts(ctx, model):
            config = ctx.config
            judged = config_of(
                "sources", "teacher", model=config.policy, keep="all", sampling=config.sampling
            )
            return TrainSetup(
                source_of(ctx, model, {"teacher": judged}),
                terms_of({"outcome": config_of("objectives", "outcome")}),
                rewards=[reward_of(ctx, "verifier")],
            )

        return train(ctx, ctx.student(classifier=True), parts)
