"""A weight by the token's place in its response: a sigmoid that rises or falls. No default.

PW-OPSD (arXiv 2605.21606): w = least + (1 - least) sigmoid((t/T - middle) / slope), t from 1, T the
length of the response itself. Late tokens count more: found in self-distillation with a privileged
context. With an external teacher the evidence is the opposite one (arXiv 2606.22600, 2604.13016:
its scores lose worth along the student's prefix), so ``shape`` must be said; ``early``, the mirror
image, is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opdctl.config.schema import REQUIRED, key
from opdctl.protocols import Weight


class Position(Weight):
    """A sigmoid in the token's share of its response, late or early (PW-OPSD)."""

    revision = 1
    needs = ()

    @dataclass(kw_only=True)
    class Config:
        """The keys of position."""

        shape: Literal["late", "early"] = key(REQUIRED, "which tokens count more: late or early")
        least: float = key(0.25, "weight far from the favoured end", least=0, most=1)
        middle: float = key(0.30, "share of the response where the sigmoid turns", least=0, most=1)
        slope: float = key(0.10, "width of the turn, in shares of the response", least=1e-3)

    def __init__(self, config) -> None:
        self.config = config

    def factor(self, step):
        """Return the factor of each token. Shape [N]."""
        place_N, length_N = step.places()
        config = self.config
        z_N = ((place_N + 1).to(step.model.logits_dtype) / length_N - config.middle) / config.slope
        z_N = z_N if config.shape == "late" else -z_N
        return config.least + (1 - config.least) * z_N.sigmoid()
