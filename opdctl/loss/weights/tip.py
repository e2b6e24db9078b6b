"""The tokens that matter most: the student is uncertain, or far from its teacher, or both.

TIP (arXiv 2604.14084): h the student's entropy, d its reverse KL to the teacher, each brought to
[0, 1] by the least and largest of the step; score h + d - h d, a soft or; the top share is kept
and makes the count. Of h the largest 2 % are cut to their threshold first; its division by log |V|
would change nothing, since the scale is taken out. Left out: the released code draws tokens by h
and the divergence in place of taking the largest, and the paper's score of confident mistakes.
That the range and the share are those of the whole step is ours, so is the default share (the
paper shows .2 and .5).

    opdctl stage opd --student DIR --teacher math=DIR --method tip
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.errors import Problem
from opdctl.protocols import Weight
from opdctl.scoring.columns import POLICY_ENTROPY, POLICY_KL


class Tip(Weight):
    """Keeps the tokens highest in soft-or of student entropy and divergence (TIP)."""

    revision = 1
    needs = ("teacher.hidden", "policy.kl", "policy.entropy")

    @dataclass(kw_only=True)
    class Config:
        """The keys of tip."""

        keep: float = key(0.5, "share of the step's tokens", least=1e-6, most=1.0)
        cut: float = key(
            0.02, "share of the largest entropies cut to their threshold", least=0, most=0.99
        )

    @staticmethod
    def problems(config, stage) -> list[Problem]:
        """A baseline over the top alone, whose divergence would stand for the whole one."""
        baseline = stage.signals.get("kl_baseline")
        if baseline is None or not baseline.coef or baseline.support == "full":
            return []
        message = "ranks by the divergence over all ids, and kl_baseline asks for that over some"
        return [Problem("", message, "signals.kl_baseline.support=full, or leave one of them out")]

    def __init__(self, config) -> None:
        self.config = config

    def score(self, step):
        """Return h + d - h d of every token, [N], from 0 to 1."""
        entropy_N, kl_N = (step.columns[c].double() for c in (POLICY_ENTROPY, POLICY_KL))
        ranked_N = entropy_N.sort().values  # torch.quantile takes 16 million numbers at most
        threshold = ranked_N[round((1 - self.config.cut) * (len(ranked_N) - 1))]
        h_N, d_N = scaled(entropy_N.clamp(max=threshold)), scaled(kl_N)
        return h_N + d_N - h_N * d_N

    def mask(self, step):
        """Return the mask. Shape [N]."""
        return step.largest(self.score(step), self.config.keep)


def scaled(value_N):
    """Scale to [0, 1] by its least and its largest; all 0 where they are equal."""
    low, high = value_N.min(), value_N.max()
    return (value_N - low) / (high - low) if high > low else value_N - low
