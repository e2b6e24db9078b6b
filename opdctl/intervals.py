"""95 % intervals of means over prompts and over seeds, which keep a width where answers agree.

Standard errors vanish when all of a few verdicts are equal, and an interval made of them says that
nothing else can happen. ``wilson`` inverts the score test instead (Wilson 1927); ``newcombe`` makes
the interval of a difference of two paired shares from theirs (method 10 of Newcombe, Statistics in
Medicine 17:2635, 1998). Verdicts between 0 and 1 are taken as they are: no such mean varies more
than a share does, so the intervals are wide enough.

Over several seeds a score has two sources of error, crossed: the seed of the training, and the
prompts, which are the same on every seed. With S seeds and n prompts, y_si = mu + b_s + p_i + e_si,
and the variance of the mean is

    sigma_b^2 / S + sigma_p^2 / n + sigma_e^2 / (S n).

Measured are, by the expected mean squares of a crossed layout (Cornfield and Tukey, Annals of
Mathematical Statistics 27:907, 1956; with clusters of two kinds, Cameron, Gelbach and Miller,
Journal of Business and Economic Statistics 29:238, 2011),

    A = variance of the seeds' means / S          estimates sigma_b^2 / S + sigma_e^2 / (S n)
    P = variance of the mean under other prompts  estimates sigma_p^2 / n + sigma_e^2 / (S n)
    W = that of one seed's mean, averaged         estimates sigma_p^2 / n + sigma_e^2 / n

and C = P - (W - P) / (S - 1), at least 0, estimates sigma_p^2 / n, so that A + C is the variance of
the mean. It has f = (A + C)^2 (S - 1) / A^2 degrees of freedom (Satterthwaite, Biometrics Bulletin
2:110, 1946), and with Student's t the ends lie at

    distance^2 = max(t_f^2 (A + C), t_(S-1)^2 A, z^2 P)

from the mean. The second term is Student's interval over seeds, which is right where each seed has
prompts of its own. The third is the floor: seeds that agree by chance cannot make an interval
narrower than the prompts alone do. On one seed it is all there is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Z = 1.96
# two-sided 97.5 % quantiles of Student's t for 1 .. 30 degrees of freedom
T975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def student(free: Floats | float) -> Floats:
    """Return the 97.5 % quantile of Student's t for one degree of freedom or more.

    Below 30 degrees it is interpolated in a table; beyond, the expansion 26.7.5 of Abramowitz and
    Stegun is right to three digits.
    """
    free = np.asarray(free, np.float64)
    table = np.interp(free, np.arange(1, len(T975) + 1), T975)
    beyond = Z + (Z**3 + Z) / (4 * free) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * free**2)
    return np.where(free <= len(T975), table, beyond)


def wilson(share: float, count: int) -> list[float]:
    """Both ends for a share of ``count`` independent answers, at least one."""
    low, high = _score_ends(np.asarray(share), np.asarray(Z**2 / count))
    return [float(low), float(high)]


def newcombe(pairs: Sequence[tuple[float, float]]) -> list[float]:
    """Both ends for the mean of second less first, over at least one pair of verdicts."""
    count = len(pairs)
    first, second = (sum(side) / count for side in zip(*pairs, strict=True))
    (low_1, high_1), (low_2, high_2) = wilson(first, count), wilson(second, count)
    cov = sum(a * b for a, b in pairs) / count - first * second
    if cov > 0:
        cov = max(0.0, cov - 1 / (2 * count))  # the continuity correction of the method
    spread = math.sqrt(first * (1 - first) * second * (1 - second))
    phi = cov / spread if spread else 0.0
    down, up = (second - low_2, high_1 - first), (high_2 - second, first - low_1)
    gain = second - first
    return [max(-1.0, gain - _joined(*down, phi)), min(1.0, gain + _joined(*up, phi))]


def _joined(a: float, b: float, phi: float) -> float:
    return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))


def squared_distance(seeds: Floats, prompts: Floats, of_one: Floats, count: int) -> Floats:
    """Return the squared distance of the ends from a mean over seeds but for the floor, which the
    prompts alone are; the module has the formula. It is 0 on one seed.

    Args:
        seeds: A.
        prompts: P.
        of_one: W.
        count: seeds.
    """
    if count == 1:
        return np.zeros_like(prompts)
    common = np.maximum(0.0, prompts - np.maximum(0.0, of_one - prompts) / (count - 1))
    whole = seeds + common
    with np.errstate(divide="ignore", invalid="ignore"):  # seeds that agree
        free = np.where(seeds > 0, (count - 1) * (whole / seeds) ** 2, np.inf)
    return np.maximum(student(free) ** 2 * whole, student(count - 1) ** 2 * seeds)


def share_ends(of_seeds: Sequence[Floats]) -> tuple[Floats, Floats]:
    """Return both ends for the mean of a share over seeds and prompts; they lie in [0, 1].

    It is Wilson's interval for as many answers as have the measured variance (Kott and Carr,
    Journal of Official Statistics 13:367, 1997; among others in Franco, Little, Louis and Slud,
    Journal of Survey Statistics and Methodology 7:334, 2019): p solves
    (mean - p)^2 = distance^2 p (1 - p) / (q (1 - q)). Two prompts are added to those measured, one
    right on every seed and one wrong (Agresti and Caffo, The American Statistician 54:280, 2000):
    q is their mean and the variances are over them, so none vanishes. On one seed of verdicts that
    are 0 or 1 this is ``wilson`` of as many prompts.

    Coverage falls below nominal where few seeds scatter by orders of magnitude near 0 or 1: it is
    .89 for five whose logits have a standard deviation of 1 about that of .03.

    Args:
        of_seeds: for each seed a score from 0 to 1 of each prompt, [..., n]. Where all have as many
            prompts these are taken to be the same, in one order.
    """
    added = [np.concatenate([v, *_both_ways(v)], axis=-1) for v in of_seeds]
    counts = [v.shape[-1] for v in of_seeds]
    prompts, of_one = _prompt_variances(added, counts)
    means = np.stack([v.mean(axis=-1) for v in of_seeds], axis=-1)
    q = np.stack([v.mean(axis=-1) for v in added], axis=-1).mean(axis=-1)
    of_share = q * (1 - q)
    # no share varies more than one of as many independent verdicts
    floor = np.minimum(_prompts_quantile(counts) ** 2 * prompts / of_share, Z**2 / min(counts))
    seeds = squared_distance(_of_the_mean(means), prompts, of_one, len(counts))
    return _score_ends(means.mean(axis=-1), np.maximum(seeds / of_share, floor))


def mean_ends(of_seeds: Sequence[Floats]) -> tuple[Floats, Floats]:
    """Return both ends for the mean of a number over seeds and prompts that is no share.

    Args:
        of_seeds: see ``share_ends``.
    """
    counts = [v.shape[-1] for v in of_seeds]
    prompts, of_one = _prompt_variances(of_seeds, [n - 1 for n in counts])
    means = np.stack([v.mean(axis=-1) for v in of_seeds], axis=-1)
    distance = squared_distance(_of_the_mean(means), prompts, of_one, len(counts))
    distance = np.maximum(distance, _prompts_quantile(counts) ** 2 * prompts)
    half, centre = np.sqrt(distance), means.mean(axis=-1)
    return centre - half, centre + half


def resampled_ends(each: Floats, drawn: Floats) -> tuple[float, float]:
    """Return both ends for the mean over seeds of any number computed from scores of prompts.

    P and W are the spread of its resamples, measured between their quantiles, and these are the
    floor, so that a skewed number has a skewed interval. A resample in which the number is not
    finite counts as beyond both ends. The interval contains the mean.

    Args:
        each: the number of each seed, [S].
        drawn: that of resampled prompts, the same prompts on all seeds, [S, R].
    """
    centre = float(each.mean())
    if not math.isfinite(centre):
        return -math.inf, math.inf
    low, high = _outer(drawn.mean(axis=0))
    if not (math.isfinite(low) and math.isfinite(high)):
        return -math.inf, math.inf
    prompts = np.asarray(((high - low) / (2 * Z)) ** 2)
    inner = [_outer(row) for row in drawn]
    of_one = np.asarray(np.mean([((b - a) / (2 * Z)) ** 2 for a, b in inner]), np.float64)
    half = math.sqrt(squared_distance(_of_the_mean(each), prompts, of_one, len(each)))
    return min(low, centre - half), max(high, centre + half)


def _outer(drawn_R: Floats) -> tuple[float, float]:
    """Return the 2.5 % and 97.5 % quantiles; what is not finite is beyond both."""
    ok_R = np.isfinite(drawn_R)
    low = np.quantile(np.where(ok_R, drawn_R, -np.inf), 0.025, method="lower")
    high = np.quantile(np.where(ok_R, drawn_R, np.inf), 0.975, method="higher")
    return float(low), float(high)


def _prompt_variances(of_seeds: Sequence[Floats], counts: Sequence[int]) -> tuple[Floats, Floats]:
    """Return P and W of the module, each [...].

    Args:
        of_seeds: a number of each prompt, for each seed, [..., n].
        counts: what the variance of each seed's prompts is divided by.
    """
    divisors = [max(1, n) for n in counts]
    each = [v.var(axis=-1) / n for v, n in zip(of_seeds, divisors, strict=True)]
    of_one = np.stack(each, axis=-1).mean(axis=-1)
    if len({v.shape[-1] for v in of_seeds}) > 1:
        return of_one / len(each), of_one  # each seed has prompts of its own
    return np.stack(of_seeds, axis=-1).mean(axis=-1).var(axis=-1) / divisors[0], of_one


def _prompts_quantile(counts: Sequence[int]) -> float:
    return float(student(min(counts) - 1)) if min(counts) > 1 else Z


def _of_the_mean(means: Floats) -> Floats:
    """Return A of the module from the seeds' means, [..., S]; 0 for one seed."""
    count = means.shape[-1]
    return means.var(axis=-1, ddof=1) / count if count > 1 else np.zeros(means.shape[:-1])


def _both_ways(scores: Floats) -> tuple[Floats, Floats]:
    shape = (*scores.shape[:-1], 1)
    return np.zeros(shape), np.ones(shape)


def _score_ends(mean: Floats, k: Floats) -> tuple[Floats, Floats]:
    """Return the solutions p of (mean - p)^2 = k p (1 - p)."""
    middle, half = mean + k / 2, np.sqrt(k * mean * (1 - mean) + (k / 2) ** 2)
    low, high = (middle - half) / (1 + k), (middle + half) / (1 + k)
    return np.clip(low, 0.0, mean), np.clip(high, mean, 1.0)  # whatever was rounded
