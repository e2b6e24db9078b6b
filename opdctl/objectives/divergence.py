"""Exact divergence over the whole vocabulary between the student and the token's own teacher.

    reverse   KL(p || q), gradient p (log p - log q - KL): DeepSeek-V4 (arXiv 2606.19348) Eq. 29
    forward   KL(q || p), gradient p - q
    jsd       beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p: GKD (2306.13649)

p is the student, q the teacher, both at the sampling temperature. The jsd of beta 0 or 1 is 0 by
its formula; as in TRL those two mean forward and reverse KL, a jump that is theirs and kept.
Each is summed as p r - p + q, which is never negative term by term, so a divergence is reported
non-negative by construction. Leaves out top-k supports.

    opdctl stage opd --student DIR --teacher math=DIR 'objectives={divergence: {}}' 'signals={}'
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opdctl.schema import key
from opdctl.settings import ObjectiveConfig


class Divergence:
    """Full-vocabulary reverse KL, forward KL or JSD to the teacher of each token."""

    revision = 1
    needs = ("teacher.hidden",)
    rows = "prediction"

    @dataclass(kw_only=True)
    class Config(ObjectiveConfig):
        """Keys of divergence."""

        direction: Literal["reverse", "forward", "jsd"] = key("reverse", "student first is reverse")
        beta: float = key(0.5, "weight of the teacher in jsd's mixture", least=0, most=1)
        overlap: int = key(16, "k of the top-k overlap that is logged; 0 logs none", least=0)

    def __init__(self, config) -> None:
        self.config = config

    def loss(self, view):
        """Shape [C]."""
        config = self.config
        value_C = view.divergence(config.direction, config.beta, config.overlap)
        return value_C * view["teacher_weight"]
