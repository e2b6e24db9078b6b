"""Pre-training from scratch: a tokenizer of the corpus's characters and a small Qwen3.

Makes the starting point of a recipe at size tiny, so that nothing has to be downloaded. Leaves
out everything that a public checkpoint has: no general text, no merges in the vocabulary, and no
loss on the prompts, which at this size are random digits that cannot be predicted.

    opdctl run recipes/mimo.yaml --only base
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.registry import config_of
from opdctl.config.schema import key
from opdctl.config.settings import Optim, TrainConfig
from opdctl.errors import Problem
from opdctl.stages._stage import Stage


@dataclass(kw_only=True)
class Shape:
    """The keys of the size of the new Qwen3 model."""

    hidden: int = key(64, "width", least=8, most=2**17)
    layers: int = key(2, "transformer layers", least=1, most=2**10)
    heads: int = key(4, "query heads", least=1, most=2**12)
    kv_heads: int = key(2, "key-value heads", least=1, most=2**12)
    head_dim: int = key(16, "width of a head; even", least=2, most=2**12)
    intermediate: int = key(192, "width of the feed-forward part", least=8, most=2**20)
    tied: bool = key(True, "the head is the embedding")
    init_std: float = key(0.02, "standard deviation of the initial weights", least=0)
    context: int = key(512, "longest sequence", least=8, most=2**24)


class Pretrain(Stage):
    """A model from scratch on the data's own texts; trains the tokenizer first."""

    revision = 1
    writes = "model"
    uses = ("sources/dataset", "objectives/nll")

    @dataclass(kw_only=True)
    class Config(TrainConfig):
        """The keys of a pretrain stage."""

        model: Shape = key(Shape(), "the model made")
        corrupt: float = key(0.0, "share of the corpus's answers made wrong", least=0, most=1)
        optim: Optim = key(Optim(lr=4e-3, schedule="cosine", warmup=50), "optimizer")

    @staticmethod
    def problems(config, recipe, stage):
        """Return what the schema cannot check of the stage's keys."""
        from opdctl.stages.sft import domain_problems

        problems, shape = domain_problems(recipe, stage), config.model
        if shape.heads % shape.kv_heads:
            problems.append(
                Problem("model.heads", f"not a multiple of kv_heads ({shape.kv_heads})")
            )
        if shape.head_dim % 2:
            problems.append(Problem("model.head_dim", "rotary positions need an even width"))
        return problems

    def run(self, ctx):
        """Make tokenizer and model, train on the answers, write both."""
        from opdctl.models.from_nothing import new_model
        from opdctl.train.assemble import TrainSetup, source_of, terms_of
        from opdctl.train.loop import train

        def setup(ctx, model):
            corpus = config_of("sources", "dataset", corrupt=ctx.config.corrupt)
            terms = terms_of({"nll": config_of("objectives", "nll", normalise="token_mean")})
            return TrainSetup(source_of(ctx, model, {"dataset": corpus}), terms)

        return train(ctx, new_model(ctx), setup)
