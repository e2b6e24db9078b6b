"""The prompts of each step: a pure function of (seed, epoch, position), with no state to save.

Each domain has an order of its own per epoch. A step takes each domain's share of ``per_step``,
rounded so that the totals over all steps are exact, so the cursor is the step's number.
"""

from __future__ import annotations

import copy
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from opdctl import draws
from opdctl.errors import UsageError
from opdctl.rollout.room import require_room
from opdctl.types import Prompt

if TYPE_CHECKING:
    import numpy as np


def prompts_within_limit(ctx, model, domain: str, split: str, most: int = 0) -> Sequence[Prompt]:
    """Return the first ``most`` prompts of a domain that are not too long for the stage; 0 is all.

    Args:
        model: the model that reads the prompts; it counts their tokens.

    Raises:
        UsageError: a prompt is too long, and the stage's keys do not drop such prompts.
        Interrupted: a stop was asked for.
    """
    keys, pool = ctx.config.prompts, ctx.prompts.of(domain, split)
    if not keys.max_tokens:
        return pool[: most or None]
    kept, long = array("Q"), 0
    for place, prompt in enumerate(pool):
        if most and len(kept) == most:
            break
        ctx.check()
        length = model.prompt_length(prompt)
        if length <= keys.max_tokens:
            kept.append(place)
        elif keys.too_long == "error":
            raise UsageError(
                f"data.{domain}: the prompt {prompt.text[:60]!r} has {length} tokens, and "
                f"stages.{ctx.name}.prompts.max_tokens is {keys.max_tokens}",
                "prompts.too_long=drop leaves such prompts out, and counts them",
            )
        else:
            long += 1
    ctx.prompts.counted(domain, split, {"too long": long})
    return [pool[i] for i in kept] if isinstance(pool, list) else pool.select(kept)  # on disk


class PromptOrder:
    """The order in which a stage, or a source of some of its domains, takes prompts."""

    def __init__(self, ctx, model, domains: dict[str, bool] | None = None) -> None:
        """Collect the prompts of a stage's domains, in the order of its seed.

        Args:
            model: the model that reads the prompts; it counts their tokens. None: no prompt is
                looked at.
            domains: ``{domain: True}`` for the domains to take; empty is all.
        """
        prompts = ctx.config.prompts
        self.domains = {d for d, on in (domains or {}).items() if on} or None
        self.per_step, self.samples = prompts.per_step, prompts.samples
        self.seed, self.ctx = ctx.seed, ctx
        self.shares = ctx.recipe.domains(ctx.name)
        self.pools = {
            d: prompts_within_limit(ctx, model, d, "train", prompts.pool) for d in self.shares
        }
        empty = [d for d, pool in self.pools.items() if not pool]
        if empty:
            where = ctx.recipe.data[empty[0]].path
            raise UsageError(
                f"data.{empty[0]} has no training prompts" + (f" in {where}" if where else ""),
                "more rows, a smaller eval_share or more prompts.max_tokens: equal ones count once",
            )
        self.orders: dict[tuple[str, int], np.ndarray] = {}
        if model is not None:
            for domain, prompts in self._taken(ctx.recipe.total(ctx.name)):
                require_room(ctx, model, domain, prompts)

    def at(self, step: int) -> list[Prompt]:
        """Return the ``per_step`` prompts of a step, domains in the recipe's order."""
        taken = []
        for domain, start, stop in self._cursors(step):
            if self.domains is not None and domain not in self.domains:
                continue
            taken += [self._prompt(domain, position) for position in range(start, stop)]
        return taken

    def subset(self, keep: Callable[[int], list[int]]) -> PromptOrder:
        """Return the same order with only the prompts at the places ``keep(step)`` of each step."""

        def at(step: int) -> list[Prompt]:
            taken = self.at(step)
            return [taken[i] for i in keep(step)]

        order = copy.copy(self)
        order.at = at
        return order

    def _taken(self, steps: int) -> Iterator[tuple[str, Iterator[Prompt]]]:
        """Yield each domain and the prompts that so many steps take of it, each once."""
        for domain, _, stop in self._cursors(steps - 1):
            count = min(stop, len(self.pools[domain]))
            if count and (self.domains is None or domain in self.domains):
                yield domain, (self._prompt(domain, position) for position in range(count))

    def _cursors(self, step: int):
        """Yield (domain, first position, last position + 1) of each domain."""
        share_above = 0.0
        last = list(self.shares)[-1]
        for domain, share in self.shares.items():
            below = 1.0 if domain == last else share_above + share
            bounds = [
                math.floor(s * self.per_step * below + 1e-9)
                - math.floor(s * self.per_step * share_above + 1e-9)
                for s in (step, step + 1)
            ]
            share_above = below
            yield domain, *bounds

    def _prompt(self, domain: str, position: int) -> Prompt:
        pool = self.pools[domain]
        epoch, place = divmod(position, len(pool))
        if (domain, epoch) not in self.orders:
            self.orders.pop((domain, epoch - 2), None)
            order = draws.permutation(len(pool), self.seed, "order", domain, epoch)
            self.orders[domain, epoch] = order
        return pool[int(self.orders[domain, epoch][place])]
