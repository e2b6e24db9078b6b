"""Combinations of members that are well formed one by one and make no sense together.

Members declare what the checks read: ``kl_direction(config)`` of a signal or an objective is the
direction of the KL to the teacher whose gradient it has; ``lets_through(config)`` of a weight is
the rollouts, right or wrong, that it lets through; ``student_share(config)`` of a source is the
share of rollouts that the student samples, and ``has_logprobs`` says that they carry their
sampler's log-probs; ``on_policy_only`` of an objective says that it holds for the student's own
samples alone.
"""

from __future__ import annotations

from itertools import combinations

from opdctl.config.registry import member
from opdctl.errors import Problem


def combination_problems(config, alone: bool = False) -> list[Problem]:
    """Return combinations of members in one stage that make no sense.

    Args:
        alone: objectives are measured one by one, so check each by itself only.
    """
    checks = (
        (_on_policy_only,)
        if alone
        else (
            _same_kl_twice,
            _empty_selections,
            _on_policy_only,
            _imitation,
            _return_without_own_token,
        )
    )
    return [problem for check in checks for problem in check(config)]


def _same_kl_twice(config) -> list[Problem]:
    """Return members that have the gradient of one KL on the same rollouts.

    They are that KL with the sum of their coefs: nobody means that, and each hides the other in the
    metrics.
    """
    active = {n: s for n, s in config.signals.items() if s.coef}
    credit = [
        (f"signals.{n}", way) for n, s in active.items() if (way := _kl_direction("signals", n, s))
    ]
    problems = []
    for (one, way), (other, same) in combinations(credit, 2):
        if way == same:
            problems.append(_duplicate(other, one, way))
    terms = []
    for name, objective in config.objectives.items():
        if not objective.coef:
            continue
        sides = set(_sides_let_through(objective).values())
        ways = {_kl_direction("objectives", name, objective)}
        if "advantage" in member("objectives", name).needs:
            ways |= {way for _, way in credit}
        terms.append((f"objectives.{name}", ways - {""}, sides))
    for (one, ways, sides), (other, same, others) in combinations(terms, 2):
        disjoint = sides and others and not sides & others
        if ways & same and not disjoint:
            problems.append(_duplicate(other, one, min(ways & same)))
    return problems


def _empty_selections(config) -> list[Problem]:
    """Return weights of one objective each of which lets through only what another stops."""
    problems = []
    for name, objective in config.objectives.items():
        sides = _sides_let_through(objective)
        if objective.coef and len(set(sides.values())) > 1:
            each = " and ".join(f"{w} of {side} rollouts" for w, side in sides.items())
            path = f"objectives.{name}.weights"
            problems.append(Problem(path, f"{each}: nothing is left", "keep one of them"))
    return problems


def _sides_let_through(objective) -> dict[str, str]:
    """Return for each weight that selects rollouts which it lets through, right or wrong."""
    named = {w: (member("weights", w), keys) for w, keys in objective.weights.items()}
    sides = {w: cls.lets_through(keys) for w, (cls, keys) in named.items()}
    return {w: side for w, side in sides.items() if side}


def _kl_direction(family: str, name: str, config) -> str:
    return member(family, name).kl_direction(config)


def _duplicate(path: str, other: str, way: str) -> Problem:
    message = f"has the gradient of the {way} KL to the teacher, which {other} has too"
    if way == "states":
        message = f"brings the student's states to the teacher's, as {other} does"
    return Problem(path, message, f"keep one of them, with a larger coef; {path}.coef=0")


def _mixing_source(config) -> tuple[str, type | None, object]:
    """Return name, class and keys of the stage's source; no class if only the student samples."""
    for name, keys in config.sources.items():
        if name != "student" and member("sources", name).in_opd:
            return name, member("sources", name), keys
    return "student", None, None


def source_problems(config, recipe) -> list[Problem]:
    """Return sources that a stage cannot have, or that its engine or temperature cannot serve."""
    problems = []
    for name in config.sources:
        cls = member("sources", name)
        if not cls.in_opd:
            hint = "sources: {mixture: {student: 0.5, dataset: 0.5}}, or a stage of kind sft"
            problems.append(Problem(f"sources.{name}", "a part of a mixture here", hint))
        engine = recipe.runtime.engine
        if cls.engines is not None and engine not in cls.engines:
            message = f"mixes two models at every token, which {engine} cannot do"
            problems.append(Problem(f"sources.{name}", message, "runtime.engine=transformers"))
    if len(config.sources) > 1:
        hint = "sources: {mixture: {student: 0.5, dataset: 0.5}}"
        problems.append(Problem("sources", "several given, and one draws", hint))
    if config.loss_temperature in (0, config.sampling.temperature):
        return problems
    for name, objective in config.objectives.items():
        ratio = any(member("weights", w).is_importance_weight for w in objective.weights)
        if objective.coef and (ratio or member("objectives", name).on_policy_only):
            message = (
                "its expectation is over what was sampled, at another temperature than the loss"
            )
            hint = "loss_temperature=0, or objectives={divergence: {}}"
            problems.append(Problem(f"objectives.{name}", message, hint))
    return problems


def _on_policy_only(config) -> list[Problem]:
    """Return objectives that hold for the student's own samples, in a stage with others too."""
    name, cls, keys = _mixing_source(config)
    if cls is None or cls.student_share(keys) == 1:
        return []
    problems = []
    for objective, settings in config.objectives.items():
        if not settings.coef or not member("objectives", objective).on_policy_only:
            continue
        ratio = any(member("weights", w).is_importance_weight for w in settings.weights)
        if objective == "policy_gradient" and ratio and cls.has_logprobs:
            continue
        message = f"holds for the student's own samples, and sources.{name} mixes in others"
        hint = "objectives={divergence: {}}"
        if objective == "policy_gradient" and cls.has_logprobs:
            hint = "weights={is_gate: {low: 0, high: 1e6}}, the importance weight"
        problems.append(Problem(f"objectives.{objective}", message, hint))
    return problems


def _imitation(config) -> list[Problem]:
    """Return a problem if nll imitates the student's own samples.

    Without a selection by outcome its expected gradient is zero, and with the wrong selection it
    learns the failures.
    """
    nll, (_, cls, keys) = config.objectives.get("nll"), _mixing_source(config)
    if nll is None or not nll.coef or (cls is not None and cls.student_share(keys) == 0):
        return []
    sides = set(_sides_let_through(nll).values())
    if "right" in sides:
        return []
    message = "imitation of the student's own samples has no gradient on average"
    if sides:
        message = "imitates the student's own failures"
    hint = "objectives.nll.weights={outcome_gate: {on: right}}, or a stage of kind sft"
    return [Problem("objectives.nll", message, hint)]


def _return_without_own_token(config) -> list[Problem]:
    """Return a problem if the return lacks the token's own part and nothing else supplies it.

    Such a return is only one of the two terms of the gradient of a sequence's reverse KL.
    """
    rest = config.signals.get("return_to_go")
    if rest is None or not rest.coef or rest.own:
        return []
    active = {n: s for n, s in config.signals.items() if s.coef}
    ways = {_kl_direction("signals", n, s) for n, s in active.items()}
    ways |= {_kl_direction("objectives", n, o) for n, o in config.objectives.items() if o.coef}
    if "reverse" in ways:
        return []
    message = "without the token's own part the gradient lacks its single-step term"
    hint = "own=true, or objectives.divergence beside"
    return [Problem("signals.return_to_go.own", message, hint)]
