"""The log-ratios of a token and of all that follow it, discounted: reverse KL of whole responses.

    A_t = sum over j >= t of discount^(j - t) (log q - log p)(y_j)

Discount 0 is the immediate token alone, the signal reverse_kl (Thinking Machines; no gain was seen
from more). Discount 1 is the sequence-level reverse KL. MiniLLM (arXiv 2306.08543) takes the
token's own part out (``own: false``), to be had exactly as the objective divergence, and divides
the rest by the number of its terms (``length_norm``), T - t of them; the divisor T - t - 1 that is
in circulation is zero at the last token but one.

    opdctl stage opd --student DIR --teacher math=DIR --method minillm
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.config.settings import SignalConfig
from opdctl.errors import Problem
from opdctl.protocols import Signal
from opdctl.scoring.columns import POLICY, TEACHER, TEACHER_WEIGHT


class ReturnToGo(Signal):
    """Discounted sum of log T - log S from the token on, with or without its own part."""

    revision = 1
    needs = ("teacher.logprobs", "policy.logprobs")

    @dataclass(kw_only=True)
    class Config(SignalConfig):
        """The keys of return_to_go."""

        discount: float = key(1.0, "factor per token; 0 is the token itself alone", least=0, most=1)
        own: bool = key(True, "with the token's own log-ratio; else from the next one on")
        length_norm: bool = key(False, "divide by the number of terms (discount 1)")
        clip: float = key(0.0, "largest absolute log-ratio of a token; 0 does not clip", least=0.0)

    @staticmethod
    def problems(config, stage) -> list[Problem]:
        """Refuse keys that leave nothing, or a mean of a discounted sum."""
        problems = []
        if not config.own and not config.discount:
            message = "without the token's own part nothing is left at discount 0"
            problems.append(Problem("discount", message, "discount=1, or own=true"))
        if config.length_norm and config.discount != 1:
            message = "a discounted sum is not divided by the number of its terms"
            problems.append(Problem("length_norm", message, "discount=1, or length_norm=false"))
        return problems

    @staticmethod
    def kl_direction(config) -> str:
        """Return the direction of the KL to the teacher whose gradient it has."""
        return "reverse" if config.own else ""

    def __init__(self, config, ctx) -> None:
        self.config = config

    def credit(self, step):
        """Return the credit of each token. Shape [N]."""
        config = self.config
        ratio_N = step.columns[TEACHER] - step.columns[POLICY]
        if config.clip:
            ratio_N = ratio_N.clamp(-config.clip, config.clip)
        ratio_N = ratio_N * step.columns[TEACHER_WEIGHT]
        found_N = step.future(ratio_N, config.discount)
        if config.own:
            found_N = ratio_N + config.discount * found_N
        if config.length_norm:
            place_N, length_N = step.places()
            terms_N = length_N - place_N - (0 if config.own else 1)
            found_N = found_N / terms_N.clamp_min(1)  # without a term the sum is 0
        return found_N
