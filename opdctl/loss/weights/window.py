"""A window: the first or the last so many tokens of each response count, the others do not.

OPRD (arXiv 2606.06021) takes the last 2000 positions: on their own prefix student and teacher agree
already (cosine of the first positions .97 and above, of the last 50 .92). A mask: tokens outside
are not counted by the normaliser, and cost the loss nothing.

    opdctl stage opd --student DIR --teacher math=DIR --method oprd
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.errors import Problem
from opdctl.protocols import Weight


class Window(Weight):
    """1 on the first or the last so many tokens of each response, else 0 (OPRD)."""

    revision = 1
    needs = ()

    @dataclass(kw_only=True)
    class Config:
        """The keys of window."""

        last: int = key(0, "tokens at the end of a response that count; 1 is the last", least=0)
        first: int = key(0, "tokens at its start that count", least=0)

    @staticmethod
    def problems(config, stage) -> list[Problem]:
        """A window of nothing, or two of them."""
        if bool(config.last) != bool(config.first):
            return []
        message = "both ends are named" if config.last else "no token is in it"
        return [Problem("", message, "window: {last: 2000}, or {first: 100}; without it all count")]

    def __init__(self, config) -> None:
        self.config = config

    def mask(self, step):
        """Return the mask. Shape [N]."""
        place_N, length_N = step.places()
        if self.config.first:
            return place_N < self.config.first
        return place_N >= length_N - self.config.last
