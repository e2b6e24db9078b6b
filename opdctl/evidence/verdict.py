"""What a claim is made of: numbers with thresholds, and the verdict on them. Pure, no arrays.

A part *holds* if its estimate meets the threshold and its interval stays within delta of it or
beyond; it is *refuted* if the whole interval misses; else it is undecided. One that need only
touch its threshold holds unless the whole interval misses. Of several parts that are alternatives
one is enough. delta is .03 of a score, .05 of a recovery, and 0 of what is no score: costs, tokens,
steps, divergences, variances.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from opdctl.evidence.measured import Measured, Scores

DELTA = 0.03  # of a score
DELTA_RECOVERY = 0.05  # of a recovery


@dataclass
class Part:
    """One number of a claim and what it must be.

    Attributes:
        value: from the scores of a run to a number; from those of all its resamples, which come
            as arrays of equal length, to as many.
        least, most: the threshold, on one side or both; None on a side that is free.
        delta: how far beyond the threshold the interval may reach.
        touches: it is enough that the interval reaches the threshold.
        alternative: it is enough that one of the claim's alternatives holds.
    """

    name: str
    value: Callable[[Scores], np.ndarray]
    least: float | None = None
    most: float | None = None
    delta: float = DELTA
    touches: bool = False
    alternative: bool = False


def verdict(part: Part, estimate: float, low: float, high: float) -> bool | None:
    """True holds, False refuted, None undecided. See the module."""
    least = -math.inf if part.least is None else part.least
    most = math.inf if part.most is None else part.most
    if high < least or low > most:
        return False
    if part.touches:
        return True
    within = low >= least - part.delta and high <= most + part.delta
    return True if least <= estimate <= most and within else None


def shown(value: float) -> str:
    """Three digits after the point; of a smaller number its size."""
    return f"{value:.1e}" if 0 < abs(value) < 0.0005 else f"{value:.3f}"


def name(reference: str) -> str:
    """The stage a claim's role names."""
    return reference.removeprefix("stage:")


def mean_score(model: str, domains: dict[str, bool], *what: str) -> Callable[[Scores], np.ndarray]:
    """Mean over domains of a model's accuracy, or of another of its scores."""
    chosen = [d for d, on in domains.items() if on]
    return lambda scores: sum(scores[model, d, *what] for d in chosen) / len(chosen)


def gain(new: str, old: str, domain: str) -> Callable[[Scores], np.ndarray]:
    """How much more accurate one model is than another on a domain; both may be references."""
    new, old = name(new), name(old)
    return lambda scores: scores[new, domain] - scores[old, domain]


def mean_gain(
    new: str, old: str, domains: dict[str, bool], *what: str
) -> Callable[[Scores], np.ndarray]:
    """The same of the means over domains, of accuracy or of another score."""
    ours, theirs = (mean_score(name(m), domains, *what) for m in (new, old))
    return lambda scores: ours(scores) - theirs(scores)


def recovery(student: str, start: str, teacher: str, domain: str) -> Callable[[dict], np.ndarray]:
    """r_d = (s_d - start_d) / (T_d - start_d)."""

    def value(scores: dict) -> np.ndarray:
        gap = scores[teacher, domain] - scores[start, domain]
        return (scores[student, domain] - scores[start, domain]) / gap

    return value


def norm(student: str, start: str, teachers: dict[str, str]) -> Callable[[dict], np.ndarray]:
    """Mean recovery over domains."""
    each = [recovery(student, start, t, d) for d, t in teachers.items()]
    return lambda scores: sum(value(scores) for value in each) / len(each)


def wide_gaps(start: str, teachers: dict[str, str], found: list[Measured]):
    """The teachers whose gap over the start is at least .10 on every seed; the domains left out."""
    kept, left = {}, []
    for domain, teacher in teachers.items():
        gaps = [m.scores()[teacher, domain] - m.scores()[start, domain] for m in found]
        if min(gaps) >= 0.10:  # a recovery divides by it, seed by seed
            kept[domain] = teacher
        else:
            left.append(domain)
    return kept, left
