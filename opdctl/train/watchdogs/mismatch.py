"""Trainer and sampler disagree about the same tokens under the same weights.

The mean of |log p in the trainer - log p in the sampler|. The transformers engine is within 1e-5 of
the trainer in fp32; a served engine in bf16 is commonly near .01. More biases every ratio.
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.config.settings import WatchdogConfig
from opdctl.protocols import Watchdog


class Mismatch(Watchdog):
    """Log-probs of the sampled tokens differ between trainer and sampler."""

    revision = 1
    at_once = False
    hint = "compare precision, temperature and chat template of both; or weights: {icepop: {}}"

    @dataclass(kw_only=True)
    class Config(WatchdogConfig):
        """The keys of mismatch."""

        steps: int = key(3, "steps in a row before it acts", role="operational", least=1)
        most: float = key(0.1, "largest mean difference, nats a token", role="operational", least=0)

    def __init__(self, config) -> None:
        self.config = config

    def look(self, values: dict, first: dict) -> dict[str, str]:
        """Read ``logprob_gap``, which is logged where both are at hand."""
        gap = values.get("logprob_gap", 0.0)
        most = self.config.most
        return {"": f"{gap:.4g} nats a token apart, above {most:g}"} if gap > most else {}
