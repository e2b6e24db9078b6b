"""95 % intervals of shares that keep a width where every answer is alike.

Standard errors vanish when all of a few verdicts are equal, and an interval made of them says that
nothing else can happen. ``wilson`` inverts the score test instead (Wilson 1927); ``newcombe`` makes
the interval of a difference of two paired shares from theirs (method 10 of Newcombe, Statistics in
Medicine 17:2635, 1998). Verdicts between 0 and 1 are taken as they are: no such mean varies more
than a share does, so the intervals are wide enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.96


def wilson(share: float, count: int) -> list[float]:
    """Both ends for a share of ``count`` independent answers, at least one."""
    middle, whole = share + Z**2 / (2 * count), 1 + Z**2 / count
    half = Z * math.sqrt(share * (1 - share) / count + (Z / (2 * count)) ** 2)
    return [max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)]


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
