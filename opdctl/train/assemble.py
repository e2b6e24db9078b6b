"""A stage's Config -> the loop's parts: members are looked up by name and given what they need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from opdctl.config import references
from opdctl.config.registry import member, parse_need
from opdctl.config.settings import Teacher, routes
from opdctl.loss.token_view import LossTerm, PerStep
from opdctl.models.hidden_layers import layers_of
from opdctl.scoring.score import LISTED
from opdctl.train.context import Context
from opdctl.train.step import TrainSetup
from opdctl.types import Rollout


def terms_of(objectives: dict[str, Any]) -> list[LossTerm]:
    """The objectives of a stage with their weights; those with coefficient 0 are left out."""
    terms = []
    for name, config in objectives.items():
        weights = {w: member("weights", w)(c) for w, c in config.weights.items()}
        masks, factors = (
            [
                PerStep(f"{kind}.{name}.{w}", getattr(m, kind))
                for w, m in weights.items()
                if hasattr(m, kind)
            ]
            for kind in ("mask", "factor")
        )
        gates = [w for w in weights.values() if hasattr(w, "gate")]
        objective = member("objectives", name)(config)
        needs = {n for w in weights.values() for n in w.needs}
        term = LossTerm(objective, config.coef, config.normalise, masks, gates, factors, needs)
        if config.coef:
            terms.append(term)
    return terms


def source_of(ctx: Context, model: Any, sources: dict[str, Any]) -> Any:
    """The source of a stage; of several, each for its own domains."""
    named = {d for c in sources.values() for d, on in getattr(c, "domains", {}).items() if on}
    rest = {d: True for d in ctx.recipe.domains(ctx.name) if d not in named}
    each = [
        member("sources", name)(
            replace(c, domains=rest) if getattr(c, "domains", None) == {} else c, ctx, model
        )
        for name, c in sources.items()
    ]
    return each[0] if len(each) == 1 else Together(each)


class Together:
    """Several sources of one stage, each with domains of its own; a dataset samples nothing."""

    def __init__(self, sources: list[Any]) -> None:
        self.sources = sources
        self.samples_from = "teacher"

    def draw(self, step: int) -> list[Rollout]:
        """What each draws, groups numbered through."""
        rollouts: list[Rollout] = []
        for source in self.sources:
            first = 1 + max((r.group for r in rollouts), default=-1)
            for rollout in source.draw(step):
                rollout.group += first
                rollouts.append(rollout)
        return rollouts

    @property
    def sampled(self) -> int:
        return sum(s.sampled for s in self.sources)

    @property
    def parameters(self) -> float:
        return sum(s.parameters * s.sampled for s in self.sources) / max(1, self.sampled)


def asked_for(terms: list[LossTerm], signals: dict[str, tuple[float, Any]]) -> tuple[set[str], int]:
    """What members need, and how many of a side's most probable tokens."""
    needs = {n for _, s in signals.values() for n in s.needs}
    for term in terms:
        needs.update(term.objective.needs, term.needs)
    return needs, max((getattr(t.objective.config, "k", 0) for t in terms), default=0)


def reward_of(ctx: Context, reference: str) -> Any:
    """The verifier, or the outcome model a reference names."""
    if reference == "verifier":
        return member("rewards", "verifier")(ctx)
    return member("rewards", "model")(ctx, reference)


def teacher_of(ctx: Context, model: Any, name: str, teacher: Teacher, wanted: set, top: int) -> Any:
    """The member of ``teachers/`` for what a reference names; a server is asked whether it gives
    what is wanted."""
    for own, keys in teacher.scored_by.items():
        return member("teachers", own)(keys, ctx, model, name, teacher.model)
    if references.parse(teacher.model).form != "server":
        return member("teachers", "local")(ctx, model, name, teacher.model)
    return member("teachers", "server")(ctx, model, name, teacher.address, sorted(wanted), top)


def on_policy(ctx: Context, model: Any, teachers: dict[str, Teacher]) -> TrainSetup:
    """Parts of a stage whose student samples: rl and opd.

    Raises:
        UsageError: the student cannot be taught by its teachers; see ``preflight/``.
    """
    config = ctx.config
    terms = terms_of(config.objectives)
    signals = {
        n: (c.coef, member("signals", n)(c, ctx)) for n, c in config.signals.items() if c.coef
    }
    needs, k = asked_for(terms, signals)
    rewards = [
        reward_of(ctx, c.reward)
        for n, c in config.signals.items()
        if c.coef and hasattr(c, "reward")
    ]
    local, route = {}, {}
    which = {about for name, about in map(parse_need, needs) if name == "student.hidden"}
    layers = layers_of(model, which) if which else None
    compared = {"teacher.hidden{" + about + "}" for about in which}
    wanted = {n.removeprefix("teacher.") for n in needs - compared if n.startswith("teacher.")}
    rebuilds = bool({"hidden", "listed"} & wanted)
    if layers:
        wanted |= {"inner"} if layers.inner else set()
        wanted |= {"hidden"} if layers.depth in layers.chosen else set()
    refers = {n.removeprefix("reference.") for n in needs if n.startswith("reference.")}
    reference, sources = None, getattr(config, "sources", {})
    if refers:
        reference = member("teachers", "local")(ctx, model, "reference", config.reference)
    weights = [w for o in config.objectives.values() if o.coef for w in o.weights.values()]
    ids = [w.k for w in weights if hasattr(w, "k")]
    k = max([k, *ids])
    if wanted or sources:
        local = {
            n: (teacher_of(ctx, model, n, t, wanted, k), t.weight) for n, t in teachers.items()
        }
        if "listed" in wanted and all("teacher.hidden" in t.provides for t, _ in local.values()):
            wanted = wanted - {"listed"} | set(LISTED["listed"])
        route = routes(ctx.recipe.domains(ctx.name), teachers)
        ctx.inspect(model)
    updates = getattr(config, "updates_per_rollout", 1)  # gradients of one step are not applied
    minibatches = getattr(config, "minibatches", 1)
    several = updates * minibatches > 1
    policy = [n.removeprefix("policy.") for n in sorted(needs) if n.startswith("policy.")]
    if "old.logprobs" in needs and several and "logprobs" not in policy:
        policy.append("logprobs")
    baseline = next((s.config for _, s in signals.values() if "policy.kl" in s.needs), None)
    top = baseline.k if baseline and baseline.support != "full" else 0
    return TrainSetup(
        source=source_of(ctx, model, sources)
        if sources
        else member("sources", "student")(None, ctx, model),
        terms=terms,
        controllers={
            n: member("controllers", n)(c, ctx, model)
            for n, c in getattr(config, "controllers", {}).items()
        },
        signals=signals,
        rewards=rewards,
        teachers=local if wanted else {},
        reference=reference,
        reference_wants=tuple(sorted(refers)),
        route=route,
        teacher_wants=tuple(sorted(wanted)),
        layers=layers,
        rebuilds=rebuilds,
        teacher_top=k,
        policy_wants=tuple(policy),
        policy_top=top,
        overlap_top=max(ids, default=16),
        judged="verdict" in needs,
        temperature=getattr(config, "loss_temperature", 0) or config.sampling.temperature,
        sampled_at=config.sampling.temperature,
        steps=getattr(config, "steps", 1),  # gradients has batches, all of the same weights
        updates=updates,
        minibatches=minibatches,
    )
