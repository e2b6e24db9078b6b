"""Leaps along the direction that training took since the last one, kept while a verifier agrees.

EffOPD (arXiv 2605.11739): at steps t = 2^n the weights of attention and MLP are set to
W_t + 2 k (W_t - W_{t/2}), k = 1, 2, .. 5 in turn (first: W_1 - W_0). Each is scored on a fixed
set of training prompts and kept as long as it is no worse than the best before it; at the first
that is, the weights go back to the best, to the bit. Moments are not touched; the next direction
is measured from what was kept. Adapters move in product space (``models/extrapolation.py``). Costs
a copy of what moves in host memory and in every checkpoint, and while it scores a second one in
memory.

The prompts are drawn once, in the stage's shares; they are answered at the stage's temperature,
one response each, with the same draws for every candidate of a step, so scores are compared prompt
by prompt. With 50 prompts one standard error of a score is about .07: noise passes the paper's
rule (a candidate may equal the best), and where every answer gets the same verdict it leaps on
nothing, which the log and the row (``extrapolate_blind``) say. ``margin`` and ``errors`` are ours;
the released code keeps what is strictly better: margin 0.001.

    opdctl stage opd --student DIR --teacher math=DIR --method effopd
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from opdctl.config.schema import key
from opdctl.config.settings import ControllerConfig
from opdctl.errors import Problem, UsageError
from opdctl.protocols import Controller
from opdctl.rollout.prompts import PromptOrder
from opdctl.rollout.sampling import sample_group

if TYPE_CHECKING:
    from torch import Tensor

    from opdctl.models.extrapolation import AdapterLine, WeightLine


class Extrapolate(Controller):
    """Leaps ahead along the last direction at steps 2^n, as far as a verifier agrees (EffOPD)."""

    revision = 1
    needs = ("verdict",)

    @dataclass(kw_only=True)
    class Config(ControllerConfig):
        """The keys of extrapolate."""

        modules: list[str] = key(
            [r"attn\.|attention\.", r"mlp\.|moe\.|feed_forward\."],
            "regular expressions of the names of weights that move; each must be found",
        )
        candidates: int = key(5, "how many times it leaps on", least=1)
        stride: float = key(2.0, "candidate k is W + stride k (W - W before)", least=1e-6)
        size: int = key(50, "prompts that score a candidate", least=1)
        margin: float = key(0.0, "least gain of its score over the best", least=-1, most=1)
        errors: float = key(
            0.0, "and by more than so many standard errors of the paired difference", least=0
        )

    @staticmethod
    def problems(config, stage) -> list[Problem]:
        """Refuse what is no regular expression, and nothing to move."""
        problems = [] if config.modules else [Problem("modules", "names nothing", "leave it out")]
        for pattern in config.modules:
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(Problem("modules", f"{pattern!r:.80}: {error}", r"attn\. or mlp\."))
        return problems

    def __init__(self, config, ctx, model) -> None:
        self.config, self.ctx, self.model, self.sampled = config, ctx, model, 0
        self.where = f"stages.{ctx.name}.controllers.extrapolate"
        self.prompts = self._drawn()
        self.previous: dict[str, Tensor] = {}

    def _drawn(self) -> list:
        """The prompts that score, in an order of their own.

        Raises:
            UsageError: there are fewer.
        """
        order, size = PromptOrder(self.ctx, self.model), self.config.size
        order.per_step, order.seed = size, f"{self.ctx.seed} extrapolate"
        prompts = order.at(0)
        if len({p.id for p in prompts}) < size:
            pools = {d: len(order.pools[d]) / share for d, share in order.shares.items()}
            few = min(pools, key=lambda domain: pools[domain])
            shortage = f"{self.where}.size is {size}, and {few} has {len(order.pools[few])} prompts"
            raise UsageError(f"{shortage} for its share", f"{self.where}.size={int(pools[few])}")
        return prompts

    def start(self) -> None:
        """Keep the weights before the first step, from which the first direction is measured."""
        self.previous = self.line.snapshot()

    @cached_property
    def line(self) -> WeightLine | AdapterLine:
        """The line that the weights move on, from where they are when it is first asked for."""
        from opdctl.models.extrapolation import line_of

        return line_of(self.model, self.config.modules, f"{self.where}.modules")

    def state(self) -> dict:
        """Return where the last leap ended, and what an adapter has beside it; tensors are never
        changed in place."""
        tensors = {f"previous.{name}": value for name, value in self.previous.items()}
        return tensors | {f"line.{name}": value for name, value in self.line.state().items()}

    def load(self, state: dict) -> None:
        """Go on with a state; the weights are those that it was taken with."""

        def part(prefix: str) -> dict:
            return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}

        self.previous = part("previous.")
        self.line.load(part("line."))

    def act(self, done: int) -> dict:
        """Move ahead where ``done`` is a power of two; return the scores of all candidates and the
        one kept, 0 being none.

        Raises:
            Interrupted: a stop was asked for; the weights are as they were.
        """
        self.sampled = 0
        if done & (done - 1):
            return {}
        start, scores, kept = self.line.snapshot(), [], 0
        best: list[float] = []
        verdicts: set[float] = set()
        try:
            for k in range(self.config.candidates + 1):
                self.line.move_to(start, self.previous, self.config.stride * k)
                right = self._score(done, k)
                scores.append(sum(right) / len(right))
                verdicts.update(right)
                if k and not self.better(right, best):
                    break
                best, kept = right, k
        except BaseException:
            self.line.move_to(start, self.previous, 0)
            raise
        self.line.move_to(start, self.previous, self.config.stride * kept)
        self.line.keep()
        self.previous = self.line.snapshot()
        blind = len(verdicts) == 1
        if blind and kept:
            verdict = (
                f"[{self.ctx.name}] warning: extrapolate leapt on no evidence: every answer got the"
            )
            print(f"{verdict} same verdict; {self.where}.margin=0.001 asks for a gain", flush=True)
        return {"scores": scores, "accepted": kept, **({"blind": True} if blind else {})}

    def better(self, right: list[float], best: list[float]) -> bool:
        """Return True where verdicts are good enough to replace the best, prompt by prompt."""
        gains = [new - old for new, old in zip(right, best, strict=True)]
        mean = sum(gains) / len(gains)
        if mean < self.config.margin - 1e-9:  # a mean of verdicts is a fraction
            return False
        spread = sum((g - mean) ** 2 for g in gains) / max(1, len(gains) - 1)
        return not self.config.errors or mean > self.config.errors * (spread / len(gains)) ** 0.5

    def _score(self, done: int, k: int) -> list[float]:
        """The verdicts on the weights as they stand."""
        rollouts = sample_group(
            self.ctx,
            self.model,
            self.prompts,
            done - 1,
            "student",
            samples=1,
            purpose="extrapolate",
            version=f"{done} extrapolated {k}",
        )
        self.sampled += sum(r.forwarded for r in rollouts)
        return self.ctx.verdicts.verify(rollouts)
