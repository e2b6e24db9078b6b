"""Outcome reward model: a scalar head on a language model, trained on rollouts that the verifier
has labelled. Its probability that an answer is right can stand in for the verifier later.

MiMo-V2-Flash's "ORM"; token-level verifiers as in Cobbe et al. 2021 (arXiv 2110.14168). Leaves
out pairwise preferences and generative judges. The output is a transformers token classifier.

    opdctl run recipes/mimo.yaml --only orm
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.registry import config_of
from opdctl.schema import REQUIRED, key
from opdctl.settings import Prompts, Sampling, TrainConfig
from opdctl.stages.sft import needs_domains


class Orm:
    """A model that predicts the verifier's verdict on a rollout."""

    revision = 1
    writes = "classifier"
    uses = ("sources/teacher", "engines/transformers", "rewards/verifier", "objectives/outcome")

    @dataclass(kw_only=True)
    class Config(TrainConfig):
        """Keys of an orm stage."""

        student: str = key(REQUIRED, "where its trunk starts", ref=True)
        policy: str = key(REQUIRED, "whose rollouts it learns to judge", ref=True)
        prompts: Prompts = key(Prompts(samples=4), "which prompts")
        sampling: Sampling = key(Sampling(), "how they are sampled")

    @staticmethod
    def problems(config, recipe, stage):
        """What the schema cannot see."""
        return needs_domains(recipe, stage)

    def run(self, ctx):
        """Sample, label, train, write the classifier."""
        from opdctl.core.assemble import Parts, reward_of, source_of, terms_of
        from opdctl.core.loop import train

        def parts(ctx, model):
            config = ctx.config
            judged = config_of(
                "sources", "teacher", model=config.policy, keep="all", sampling=config.sampling
            )
            return Parts(
                source_of(ctx, model, {"teacher": judged}),
                terms_of({"outcome": config_of("objectives", "outcome")}),
                rewards=[reward_of(ctx, "verifier")],
            )

        return train(ctx, ctx.load(ctx.config.student, classifier=True, trained=True), parts)
