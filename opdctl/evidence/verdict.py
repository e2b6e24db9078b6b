"""The conditions of a claim, numbers with thresholds, and the verdict on each. Pure, no arrays.

A condition *holds* if its estimate meets the threshold and its interval stays within delta of it or
beyond; it is *refuted* if the whole interval misses; else it is undecided. A condition that need
only touch its threshold holds unless the whole interval misses. Of several alternatives one is
enough. delta is .03 for a score, .05 for a recovery, and 0 for numbers that are no score: costs,
tokens, steps, divergences, variances.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opdctl.evidence.measured import Measured, Number, Scores

DELTA = 0.03  # of a score
DELTA_RECOVERY = 0.05  # of a recovery
WORDS = {True: "holds", False: "refuted", None: "undecided"}
ROUNDING = 1e-9  # .62 - .65 is below -.03


@dataclass
class Condition:
    """One number of a claim and its threshold.

    Attributes:
        value: computes the number from the scores of a run; from the scores of all its resamples,
            arrays of equal length, it computes an array.
        least, most: the threshold, on one side or both; None on a side that is free.
        delta: how far beyond the threshold the interval may reach.
        touches: it is enough that the interval reaches the threshold.
        alternative: it is enough that one of the claim's alternatives holds.
    """

    name: str
    value: Callable[[Scores], Number]
    least: float | None = None
    most: float | None = None
    delta: float = DELTA
    touches: bool = False
    alternative: bool = False


def verdict(condition: Condition, estimate: float, low: float, high: float) -> bool | None:
    """Return True where a condition holds, False where it is refuted, None where undecided.

    A number that is not finite, or an end that is not a number, decides nothing. What differs from
    a threshold by rounding alone meets it.
    """
    if not math.isfinite(estimate) or math.isnan(low) or math.isnan(high):
        return None
    least = -math.inf if condition.least is None else condition.least - ROUNDING
    most = math.inf if condition.most is None else condition.most + ROUNDING
    if high < least or low > most:
        return False
    if condition.touches:
        return True if math.isfinite(low) and math.isfinite(high) else None
    within = low >= least - condition.delta and high <= most + condition.delta
    return True if least <= estimate <= most and within else None


def format_number(value: float | None) -> str:
    """Format a number with three digits after the point, or as 1.2e-05 where that shows nothing.

    None, which JSON has in place of a number that is not finite, is a question mark.
    """
    if value is None:
        return "?"
    if value == 0:
        return "0.000"  # no minus
    return f"{value:.1e}" if abs(value) < 0.0005 else f"{value:.3f}"


def format_estimate(value: float | None, interval: Sequence[float | None]) -> str:
    """Format a number and both ends of its interval: ``.123 [.100, .150]``.

    Every table, page and report shows its intervals by this function. See ``format_number``.
    """
    low, high = map(format_number, interval)
    return f"{format_number(value)} [{low}, {high}]"


def measured_lines(claim: dict[str, Any]) -> list[str]:
    """Return what was measured of a claim, a line for each condition, and its note.

    Args:
        claim: a record of ``judge``, or one that was kept as JSON.
    """
    lines = [
        f"{name} {format_estimate(value, claim['interval'].get(name) or (None, None))}"
        for name, value in claim["measured"].items()
    ]
    return [*lines, *([claim["note"]] if claim["note"] else [])]


def stage_name(reference: str) -> str:
    """Return the name of the stage that a role of a claim refers to."""
    return reference.removeprefix("stage:")


def mean_score(model: str, domains: dict[str, bool], *kind: str) -> Callable[[Scores], Number]:
    """Return the function for the mean over domains of a model's accuracy.

    Args:
        kind: another score than the accuracy, such as ``tokens``.
    """
    chosen = [d for d, on in domains.items() if on]
    return lambda scores: sum(scores[model, d, *kind] for d in chosen) / len(chosen)


def gain(new: str, old: str, domain: str) -> Callable[[Scores], Number]:
    """Return the function for the gain in accuracy of one model over another on a domain.

    Args:
        new, old: stages, by name or by reference.
    """
    new, old = stage_name(new), stage_name(old)
    return lambda scores: scores[new, domain] - scores[old, domain]


def mean_gain(
    new: str, old: str, domains: dict[str, bool], *kind: str
) -> Callable[[Scores], Number]:
    """Return the function for the gain of one model over another in the mean over domains.

    Args:
        new, old: stages, by name or by reference.
        kind: another score than the accuracy, such as ``pass@32``.
    """
    ours, theirs = (mean_score(stage_name(m), domains, *kind) for m in (new, old))
    return lambda scores: ours(scores) - theirs(scores)


def recovery(student: str, start: str, teacher: str, domain: str) -> Callable[[Scores], Number]:
    """Return the function for the recovery r_d = (s_d - start_d) / (T_d - start_d) of a domain."""

    def value(scores: Scores) -> Number:
        gap = scores[teacher, domain] - scores[start, domain]
        return (scores[student, domain] - scores[start, domain]) / gap

    return value


def norm(student: str, start: str, teachers: dict[str, str]) -> Callable[[Scores], Number]:
    """Return the function for the Norm, the mean recovery over domains."""
    each = [recovery(student, start, t, d) for d, t in teachers.items()]
    return lambda scores: sum(value(scores) for value in each) / len(each)


def wide_gaps(start: str, teachers: dict[str, str], runs: list[Measured]):
    """Return the teachers whose gap over the start is at least .10 on every seed, by domain; and
    the domains left out."""
    kept, left = {}, []
    for domain, teacher in teachers.items():
        gaps = [m.scores()[teacher, domain] - m.scores()[start, domain] for m in runs]
        if min(gaps) >= 0.10:  # a recovery divides by it, seed by seed
            kept[domain] = teacher
        else:
            left.append(domain)
    return kept, left
