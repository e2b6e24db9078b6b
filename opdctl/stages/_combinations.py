"""Combinations of members that are well formed one by one and make no sense together.

A member says what it gives: ``gives(config)`` of a signal or an objective is the direction of the
KL to the teacher whose gradient it has; ``side(config)`` of a weight is the rollouts, right or
wrong, that it lets through; ``own(config)`` of a source is the share of rollouts that the student
sampled, ``behaviour`` whether it knows every log-prob it sampled with; ``own`` of an objective that
it holds for the student's own samples.
"""

from __future__ import annotations

from itertools import combinations

from opdctl.config.registry import member
from opdctl.errors import Problem


def combination_problems(config, alone: bool = False) -> list[Problem]:
    """What would be counted twice, what holds for the student's own samples alone, and imitation
    of the student by itself.

    Args:
        alone: objectives are taken one by one, so only what each is by itself counts.
    """
    checks = (_own_samples,) if alone else (_twice, _nothing, _own_samples, _imitation, _halves)
    return [problem for check in checks for problem in check(config)]


def _twice(config) -> list[Problem]:
    """Two members with the gradient of one KL on the same rollouts are that KL with the sum of
    their coefs: nobody means that, and each hides the other in the metrics."""
    active = {n: s for n, s in config.signals.items() if s.coef}
    credit = [(f"signals.{n}", way) for n, s in active.items() if (way := _gives("signals", n, s))]
    found = []
    for (one, way), (other, same) in combinations(credit, 2):
        if way == same:
            found.append(_counted(other, one, way))
    terms = []
    for name, objective in config.objectives.items():
        if not objective.coef:
            continue
        sides = set(_sides(objective).values())
        ways = {_gives("objectives", name, objective)}
        if "advantage" in member("objectives", name).needs:
            ways |= {way for _, way in credit}
        terms.append((f"objectives.{name}", ways - {""}, sides))
    for (one, ways, sides), (other, same, others) in combinations(terms, 2):
        apart = sides and others and not sides & others
        if ways & same and not apart:
            found.append(_counted(other, one, min(ways & same)))
    return found


def _nothing(config) -> list[Problem]:
    """Weights of one objective of which each lets through what another stops."""
    found = []
    for name, objective in config.objectives.items():
        sides = _sides(objective)
        if objective.coef and len(set(sides.values())) > 1:
            what = " and ".join(f"{w} of {side} rollouts" for w, side in sides.items())
            path = f"objectives.{name}.weights"
            found.append(Problem(path, f"{what}: nothing is left", "keep one of them"))
    return found


def _sides(objective) -> dict[str, str]:
    """Weight -> the rollouts, right or wrong, that it lets through."""
    named = {w: (member("weights", w), keys) for w, keys in objective.weights.items()}
    return {
        w: cls.lets_through(keys)
        for w, (cls, keys) in named.items()
        if hasattr(cls, "lets_through")
    }


def _gives(family: str, name: str, config) -> str:
    cls = member(family, name)
    return cls.kl_direction(config) if hasattr(cls, "kl_direction") else ""


def _counted(path: str, other: str, way: str) -> Problem:
    what = f"has the gradient of the {way} KL to the teacher, which {other} has too"
    if way == "states":
        what = f"brings the student's states to the teacher's, as {other} does"
    return Problem(path, what, f"keep one of them, with a larger coef; {path}.coef=0")


def _source(config) -> tuple[str, type | None, object]:
    """Name, class and keys of the stage's source; of the student's, no class."""
    for name, keys in getattr(config, "sources", {}).items():
        if name != "student" and hasattr(member("sources", name), "student_share"):
            return name, member("sources", name), keys
    return "student", None, None


def source_problems(config, recipe) -> list[Problem]:
    """Sources that this stage cannot have, or that its engine or its temperature cannot serve."""
    found = []
    for name in config.sources:
        if name not in ("student", "mixture", "teacher_mixed"):
            hint = "sources: {mixture: {student: 0.5, dataset: 0.5}}, or a stage of kind sft"
            found.append(Problem(f"sources.{name}", "a part of a mixture here", hint))
        engine = recipe.runtime.engine
        if engine not in getattr(member("sources", name), "engines", (engine,)):
            what = f"mixes two models at every token, which {engine} cannot do"
            found.append(Problem(f"sources.{name}", what, "runtime.engine=transformers"))
    if len(config.sources) > 1:
        hint = "sources: {mixture: {student: 0.5, dataset: 0.5}}"
        found.append(Problem("sources", "several given, and one draws", hint))
    if config.loss_temperature in (0, config.sampling.temperature):
        return found
    for name, objective in config.objectives.items():
        ratio = any(
            getattr(member("weights", w), "is_importance_weight", False) for w in objective.weights
        )
        if objective.coef and (
            ratio or getattr(member("objectives", name), "on_policy_only", False)
        ):
            what = "its expectation is over what was sampled, at another temperature than the loss"
            hint = "loss_temperature=0, or objectives={divergence: {}}"
            found.append(Problem(f"objectives.{name}", what, hint))
    return found


def _own_samples(config) -> list[Problem]:
    """Objectives whose expectation is over the student's next token, on samples of others."""
    name, cls, keys = _source(config)
    if cls is None or cls.student_share(keys) == 1:
        return []
    found = []
    for objective, settings in config.objectives.items():
        if not settings.coef or not getattr(
            member("objectives", objective), "on_policy_only", False
        ):
            continue
        ratio = any(
            getattr(member("weights", w), "is_importance_weight", False) for w in settings.weights
        )
        if objective == "policy_gradient" and ratio and cls.has_logprobs:
            continue
        what = f"holds for the student's own samples, and sources.{name} mixes in others"
        hint = "objectives={divergence: {}}"
        if objective == "policy_gradient" and cls.has_logprobs:
            hint = "weights={is_gate: {low: 0, high: 1e6}}, the importance weight"
        found.append(Problem(f"objectives.{objective}", what, hint))
    return found


def _imitation(config) -> list[Problem]:
    """Nll on samples of the student: without a choice by outcome its expected gradient is zero, and
    with the wrong choice it learns its failures."""
    nll, (_, cls, keys) = config.objectives.get("nll"), _source(config)
    if nll is None or not nll.coef or (cls is not None and cls.student_share(keys) == 0):
        return []
    sides = set(_sides(nll).values())
    if "right" in sides:
        return []
    what = "imitation of the student's own samples has no gradient on average"
    if sides:
        what = "imitates the student's own failures"
    hint = "objectives.nll.weights={outcome_gate: {on: right}}, or a stage of kind sft"
    return [Problem("objectives.nll", what, hint)]


def _halves(config) -> list[Problem]:
    """A return without the token's own part is one of the two terms of a sequence's reverse KL."""
    rest = config.signals.get("return_to_go")
    if rest is None or not rest.coef or rest.own:
        return []
    active = {n: s for n, s in config.signals.items() if s.coef}
    ways = {_gives("signals", n, s) for n, s in active.items()}
    ways |= {_gives("objectives", n, o) for n, o in config.objectives.items() if o.coef}
    if "reverse" in ways:
        return []
    what = "without the token's own part the gradient lacks its single-step term"
    return [Problem("signals.return_to_go.own", what, "own=true, or objectives.divergence beside")]
