"""Combinations of members that are well formed one by one and make no sense together.

A member says what it gives: ``gives(config)`` of a signal or an objective is the direction of the
KL to the teacher whose gradient it has; ``side(config)`` of a weight is the rollouts, right or
wrong, that it lets through.
"""

from __future__ import annotations

from itertools import combinations

from opdctl.errors import Problem
from opdctl.registry import member


def combination_problems(config, active: dict) -> list[Problem]:
    """What would be counted twice, and imitation of the student by itself.

    Args:
        active: signals with a coef above 0.
    """
    return _twice(config, active) + _imitation(config)


def _twice(config, active: dict) -> list[Problem]:
    """Two members with the gradient of one KL on the same rollouts are that KL with the sum of
    their coefs: nobody means that, and each hides the other in the metrics."""
    credit = [(f"signals.{n}", way) for n, s in active.items() if (way := _gives("signals", n, s))]
    found = []
    for (one, way), (other, same) in combinations(credit, 2):
        if way == same:
            found.append(_counted(other, one, way))
    terms = []
    for name, objective in config.objectives.items():
        if not objective.coef:
            continue
        sides = {
            side(keys)
            for w, keys in objective.weights.items()
            if (side := getattr(member("weights", w), "side", None))
        }
        ways = {_gives("objectives", name, objective)}
        if "advantage" in member("objectives", name).needs:
            ways |= {way for _, way in credit}
        terms.append((f"objectives.{name}", ways - {""}, sides))
    for (one, ways, sides), (other, same, others) in combinations(terms, 2):
        apart = sides and others and not sides & others
        if ways & same and not apart:
            found.append(_counted(other, one, min(ways & same)))
    return found


def _gives(family: str, name: str, config) -> str:
    cls = member(family, name)
    return cls.gives(config) if hasattr(cls, "gives") else ""


def _counted(path: str, other: str, way: str) -> Problem:
    what = f"has the gradient of the {way} KL to the teacher, which {other} has too"
    return Problem(path, what, f"keep one of them, with a larger coef; {path}.coef=0")


def _imitation(config) -> list[Problem]:
    """Nll on samples of the student: without a choice by outcome its expected gradient is zero."""
    nll = config.objectives.get("nll")
    if nll is None or not nll.coef:
        return []
    if any(hasattr(member("weights", w), "side") for w in nll.weights):
        return []
    what = "imitation of the student's own samples has no gradient on average"
    hint = "objectives.nll.weights={outcome_gate: {on: right}}, or a stage of kind sft"
    return [Problem("objectives.nll", what, hint)]
