"""Sampled-token reverse KL as credit: sg[log T - log S] at the token that was sampled.

MiMo-V2-Flash (arXiv 2601.02780) Eq. 8, GLM-5 (arXiv 2602.15763) Eq. 2. Its expectation over the
student's own next token is -KL(S || T), so as an advantage it gives the reverse-KL gradient. Of
the three estimators of a KL only this one, k1, does: the credit -k2 has another gradient, and that
of -k3 is the reverse KL's minus the forward KL's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from opdctl.config.schema import key
from opdctl.config.settings import SignalConfig
from opdctl.errors import Problem
from opdctl.protocols import Signal
from opdctl.scoring.columns import POLICY, TEACHER, TEACHER_WEIGHT


class ReverseKl(Signal):
    """log T - log S at the sampled token: the teacher's approval of each token."""

    revision = 1
    needs = ("teacher.logprobs", "policy.logprobs")

    @dataclass(kw_only=True)
    class Config(SignalConfig):
        """The keys of reverse_kl."""

        clip: float = key(
            0.0, "largest absolute value of a token (MOPD paper: 5); 0 does not clip", least=0.0
        )
        floor: float = key(
            0.0,
            "lambda: no token is below log(lambda) / (1 - lambda) (REOPOLD: .1); 0 has no floor",
            least=0.0,
            most=0.999,
            neutral=True,
        )
        estimator: Literal["k1", "k2", "k3"] = key("k1", "as a credit only k1 is that of a KL")

    @staticmethod
    def problems(config, stage) -> list[Problem]:
        """Refuse estimators whose policy gradient is not that of the reverse KL."""
        if config.estimator == "k1":
            return []
        message = f"as a credit {config.estimator} does not give the gradient of the reverse KL"
        return [Problem("estimator", message, "estimator=k1, or the objective sampled_kl")]

    @staticmethod
    def kl_direction(config) -> str:
        """Return the direction of the KL to the teacher whose gradient it has."""
        return "reverse"

    def __init__(self, config, ctx) -> None:
        self.config = config

    def credit(self, step):
        """Return the credit of each token. Shape [N]; zero where teacher and student agree."""
        credit_N = step.columns[TEACHER] - step.columns[POLICY]
        if self.config.floor:
            credit_N = credit_N.clamp(min=math.log(self.config.floor) / (1 - self.config.floor))
        if self.config.clip:
            credit_N = credit_N.clamp(-self.config.clip, self.config.clip)
        return credit_N * step.columns[TEACHER_WEIGHT]
