"""Negative log-likelihood of the given tokens: pre-training and SFT."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.settings import ObjectiveConfig
from opdctl.protocols import Objective


class Nll(Objective):
    """-log p of the tokens of a demonstration."""

    revision = 1
    needs = ()
    rows = "prediction"

    @dataclass(kw_only=True)
    class Config(ObjectiveConfig):
        """No keys of its own."""

    def __init__(self, config) -> None:
        self.config = config

    def loss(self, view):
        """Return the loss of each token. Shape [C]."""
        view.log("nll", -view.logprob_C)
        return -view.logprob_C
