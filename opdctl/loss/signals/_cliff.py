"""The edge at which extrapolation leaves what an importance clip can hold: a heuristic.

arXiv 2605.08737 reports a threshold lambda*(p, b, c) above which format collapses at tokens that
are nearly determined; its formula was not found. This one is ours: the fixed point of lambda has
logit lambda logit p + (1 - lambda) logit b, p the teacher's mass on its most probable token, b the
reference's mass on it; it is held to be safe while the mass it leaves to the rest is at least
(1 - p) / c, c the clip. So

    lambda* = (log((c - 1 + p) / (1 - p)) - logit b) / (logit p - logit b)

Infinite where the reference has as much mass there as the teacher: nothing is extrapolated up.
"""

from __future__ import annotations


def threshold(logp_N, logb_N, clip: float):
    """Return lambda* of each token, in float64. Shape [N].

    Args:
        logp_N: the teacher's log-prob of its most probable token.
        logb_N: the reference's; None is b = 1/2, which has no preference.
        clip: c, above 1.
    """
    import torch

    logp_N = logp_N.double().clamp(max=-1e-12)
    rest_N = (-torch.expm1(logp_N)).log()
    odds_N = logp_N - rest_N
    base_N = torch.zeros_like(odds_N)
    if logb_N is not None:
        logb_N = logb_N.double().clamp(max=-1e-12)
        base_N = logb_N - (-torch.expm1(logb_N)).log()
    edge_N = (clip - 1 + logp_N.exp()).log() - rest_N
    up_N = odds_N > base_N
    gap_N = torch.where(up_N, odds_N - base_N, 1.0)
    return torch.where(up_N, (edge_N - base_N) / gap_N, torch.inf)
