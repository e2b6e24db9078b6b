"""Sampled-token reverse KL as credit: sg[log T - log S] at the token that was sampled.

MiMo-V2-Flash (arXiv 2601.02780) Eq. 8, GLM-5 (arXiv 2602.15763) Eq. 2. Its expectation over the
student's own next token is -KL(S || T), so as an advantage it gives the reverse-KL gradient. Of
the three estimators of a KL only this one, k1, does: the credit -k2 has another gradient, and that
of -k3 is the reverse KL's minus the forward KL's.

S is the policy as it was when the rollouts were made (``policy: old``): a credit that is worked out
once a step, as most frameworks do. Both papers' equations have the policy as it is in each update
(``policy: live``). The two are equal in a step's first update, so in a stage of one update a step;
later a live credit no longer pays for what the updates before it brought about, and falls to 0 at
the teacher. Clip and floor act on either.
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
        policy: Literal["old", "live"] = key(
            "old",
            "S: the policy that made the rollouts, or, live, as it is in each update (GLM-5 Eq. 2, "
            "MiMo Eq. 8)",
            neutral=True,
        )

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
        self.config, self.live = config, config.policy == "live"

    def credit(self, step):
        """Return the credit of each token. Shape [N]; zero where teacher and student agree."""
        return self._credit(step.columns, step.columns[POLICY])

    def credit_now(self, view):
        """Return the credit of each token of a chunk by the policy as it is. Shape [C]."""
        return self._credit(view.columns, view.logprob_C.detach())

    def _credit(self, columns, policy_N):
        credit_N = columns[TEACHER] - policy_N
        if self.config.floor:
            credit_N = credit_N.clamp(min=math.log(self.config.floor) / (1 - self.config.floor))
        if self.config.clip:
            credit_N = credit_N.clamp(-self.config.clip, self.config.clip)
        return credit_N * columns[TEACHER_WEIGHT]
