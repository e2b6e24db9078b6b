"""Binary cross-entropy of the outcome at every token of a response: an outcome reward model.

Every prefix predicts how the whole will be judged (Cobbe et al. 2021, arXiv 2110.14168, found the
token-level verifier the better one). Reading the last token gives the reward.
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.settings import ObjectiveConfig
from opdctl.protocols import Objective
from opdctl.scoring.columns import REWARD


class Outcome(Objective):
    """Cross-entropy of the verifier's verdict, predicted at every token."""

    revision = 1
    needs = ("reward",)
    rows = "token"

    @dataclass(kw_only=True)
    class Config(ObjectiveConfig):
        """No keys of its own."""

    def __init__(self, config) -> None:
        self.config = config

    def loss(self, view):
        """Return the loss of each token. Shape [C]."""
        import torch

        right_C = view[REWARD]
        view.log("guessed", ((view.score_C > 0) == (right_C > 0.5)).float())
        return torch.nn.functional.binary_cross_entropy_with_logits(
            view.score_C.float(), right_C.float(), reduction="none"
        )
