"""Policy gradient on the advantage, with PPO's asymmetric clip where it can act.

Loss of a token: -min(r A, clip(r, 1 - low, 1 + high) A), r = pi / pi_old (PPO, arXiv 1707.06347;
two bounds as in DAPO, arXiv 2503.14476, and GLM-5 Eq. 1). Without a clip it is -A log pi, whose
gradient equals that of the ratio form on the first update of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.config.settings import ObjectiveConfig
from opdctl.protocols import Objective
from opdctl.scoring.columns import ADVANTAGE


class PolicyGradient(Objective):
    """-A log pi, or PPO's clipped ratio."""

    revision = 1
    needs = ("advantage", "old.logprobs")
    rows = "prediction"
    on_policy_only = True

    @dataclass(kw_only=True)
    class Config(ObjectiveConfig):
        """The keys of policy_gradient."""

        clip_low: float = key(
            0.0, "the ratio is cut below 1 - clip_low; both 0: no clip", least=0, most=1
        )
        clip_high: float = key(0.0, "the ratio is cut above 1 + clip_high", least=0)
        advantage_clip: float = key(
            0.0, "largest absolute advantage of a token; 0 does not clip", least=0
        )

    def __init__(self, config) -> None:
        self.config = config

    def loss(self, view):
        """Return the loss of each token. Shape [C]."""
        import torch

        view.log("entropy", view.entropy_C)
        view.log("student_logprob", view.logprob_C)
        advantage_C = view[ADVANTAGE]
        if self.config.advantage_clip:
            bound = self.config.advantage_clip
            view.log("advantage_clipped", (advantage_C.abs() > bound).float())
            advantage_C = advantage_C.clamp(-bound, bound)
        if not (self.config.clip_low or self.config.clip_high):
            return -advantage_C * view.logprob_C
        ratio_C = (view.logprob_C - view.old_C).exp()
        bounded_C = ratio_C.clamp(1 - self.config.clip_low, 1 + self.config.clip_high)
        view.log("clipped", (bounded_C != ratio_C).float())
        return -torch.minimum(ratio_C * advantage_C, bounded_C * advantage_C)
