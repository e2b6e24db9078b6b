"""The longest response of the next step, moved by how far responses go before they drift.

Prune-OPD (arXiv 2605.07804): a rollout hits where its effective length, the tokens whose decay is
above 0 (``weights/overlap``; without it, its length), comes within ``margin`` of the limit. Enough
hits widen the limit by ``step``; after ``patience`` steps in a row without, it narrows by as much;
always from ``least`` to ``most``. The stage begins with ``sampling.max_tokens``. It acts on the
next step's draws, never on a response that is being written. Ours: that the count of misses begins
anew once the limit has narrowed, and that a hit needs ``least`` tokens whatever the margin.

    opdctl stage opd --student DIR --teacher math=DIR --method prune_opd
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.config.settings import ControllerConfig
from opdctl.errors import Problem
from opdctl.protocols import Controller
from opdctl.scoring.columns import DECAY

EFFECTIVE = 1e-8  # a decay that is above 0, whatever the rounding


class Length(Controller):
    """The limit of a response follows the effective lengths of the step before (Prune-OPD)."""

    revision = 1
    needs = ()

    @dataclass(kw_only=True)
    class Config(ControllerConfig):
        """The keys of length."""

        least: int = key(1024, "smallest limit, tokens", least=1)
        most: int = key(12288, "largest limit, tokens", least=1)
        step: int = key(100, "tokens that the limit moves by", least=1)
        margin: int = key(100, "a hit comes within so many tokens of the limit", least=0)
        hits: float = key(0.1, "least share of hits that widens the limit", least=0, most=1)
        patience: int = key(3, "steps in a row with fewer, until it narrows", least=1)

    @staticmethod
    def problems(config, stage) -> list[Problem]:
        """A start outside the window, and costs that are counted by the start."""
        problems, start = [], stage.sampling.max_tokens
        if config.least > config.most:
            message = f"least is {config.least}, most {config.most}"
            problems.append(Problem("least", message, f"least={config.most}"))
        elif not config.least <= start <= config.most:
            message = f"the stage begins with sampling.max_tokens={start}, outside "
            message += f"{config.least} to {config.most}"
            hint = f"sampling.max_tokens={config.least}, or least and most around {start}"
            problems.append(Problem("", message, hint))
        outcome = stage.signals.get("outcome")
        if outcome and outcome.coef and outcome.length_penalty:
            message = "moves the limit by which signals.outcome.length_penalty is counted"
            problems.append(Problem("", message, "signals.outcome.length_penalty=0"))
        return problems

    def __init__(self, config, ctx, model) -> None:
        self.config, self.ctx = config, ctx
        self.load({"limit": ctx.config.sampling.max_tokens, "misses": 0})

    def state(self) -> dict:
        """The limit of the step to come, and how many in a row missed."""
        return {"limit": self.ctx.longest, "misses": self.misses}

    def load(self, state: dict) -> None:
        """Go on with a state."""
        self.ctx.longest, self.misses = state["limit"], state["misses"]

    def read(self, step) -> dict:
        """Look at a step's sampled rollouts, set the limit of the next one; what to log."""
        limit = self.ctx.longest
        sampled = [i for i, r in enumerate(step.rollouts) if r.source != "dataset"]
        effective = self.effective(step)
        lengths = [effective[i] for i in sampled]
        if not lengths:
            return {"limit": limit, "most": self.config.most}
        hits = self.follow(lengths)
        mean = sum(lengths) / len(lengths)
        return {"limit": limit, "most": self.config.most, "hits": hits, "effective": mean}

    def effective(self, step) -> list[float]:
        """Return the tokens of each rollout before its decay is 0."""
        if DECAY not in step.columns:
            return [float(r.length) for r in step.rollouts]
        from opdctl.models.packing import per_sequence

        kept_N = (step.columns[DECAY] > EFFECTIVE).double()
        return per_sequence(kept_N, step.sequence_N, len(step.rollouts)).tolist()

    def follow(self, lengths: list[float]) -> float:
        """Move the limit by the effective lengths of a step; the share of hits."""
        config, limit = self.config, self.ctx.longest
        near = max(config.least, limit - config.margin)
        hits = sum(e >= near for e in lengths) / len(lengths)
        self.misses = 0 if hits >= config.hits else self.misses + 1
        if not self.misses:
            limit += config.step
        elif self.misses == config.patience:
            self.misses, limit = 0, limit - config.step
        self.ctx.longest = min(max(limit, config.least), config.most)
        return hits
