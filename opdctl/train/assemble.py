"""The loop's setup, made from a stage's Config: members are looked up by name and get what they
need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from opdctl.config import references
from opdctl.config.registry import member, parse_need
from opdctl.config.schema import has_key
from opdctl.config.settings import Teacher, routes
from opdctl.loss.token_view import LossTerm, PerStep
from opdctl.models.hidden_layers import layers_of
from opdctl.protocols import Gates, Masks, Scales
from opdctl.scoring.asks import Asks
from opdctl.scoring.quantities import HIDDEN, INNER, TOPK, TOPK_LIST
from opdctl.train.context import Context
from opdctl.train.step import TrainSetup
from opdctl.types import Rollout


def terms_of(objectives: dict[str, Any]) -> list[LossTerm]:
    """The objectives of a stage with their weights; those with coefficient 0 are left out."""
    terms = []
    for name, config in objectives.items():
        weights = {w: member("weights", w)(c) for w, c in config.weights.items()}
        masks = [
            PerStep(f"mask.{name}.{w}", weight.mask)
            for w, weight in weights.items()
            if isinstance(weight, Masks)
        ]
        factors = [
            PerStep(f"factor.{name}.{w}", weight.factor)
            for w, weight in weights.items()
            if isinstance(weight, Scales)
        ]
        gates = [weight for weight in weights.values() if isinstance(weight, Gates)]
        objective = member("objectives", name)(config)
        needs = {n for w in weights.values() for n in w.needs}
        term = LossTerm(objective, config.coef, config.normalise, masks, gates, factors, needs)
        if config.coef:
            terms.append(term)
    return terms


def source_of(ctx: Context, model: Any, sources: dict[str, Any]) -> Any:
    """The source of a stage; of several, each for its own domains."""
    taken = {d for c in sources.values() for d, on in c.domains.items() if on}
    rest = {d: True for d in ctx.recipe.domains(ctx.name) if d not in taken}
    each = [
        member("sources", name)(
            replace(c, domains=rest) if has_key(c, "domains") and not c.domains else c, ctx, model
        )
        for name, c in sources.items()
    ]
    return each[0] if len(each) == 1 else Together(each)


class Together:
    """The several sources of one stage, each with domains of its own; a dataset samples nothing."""

    def __init__(self, sources: list[Any]) -> None:
        self.sources = sources
        self.samples_from = "teacher"

    def draw(self, step: int) -> list[Rollout]:
        """Return what each draws, groups numbered through."""
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


def needs_in(terms: list[LossTerm], signals: dict[str, tuple[float, Any]]) -> set[str]:
    """Return what the members of a stage need."""
    needs = {n for _, s in signals.values() for n in s.needs}
    for term in terms:
        needs.update(term.objective.needs, term.needs)
    return needs


def named(needs: set[str], giver: str) -> set[str]:
    """Return the needs of one giver, without its name: ``teacher.logprobs`` -> logprobs."""
    return {n.removeprefix(f"{giver}.") for n in needs if n.startswith(f"{giver}.")}


def asks_of_objectives(config: Any) -> Asks:
    """Return what the objectives of a stage and their weights ask of a served teacher."""
    terms = terms_of(config.objectives)
    top = max([0, *(t.objective.config.k for t in terms)])
    return Asks(frozenset(named(needs_in(terms, {}), "teacher")), top)


def reward_of(ctx: Context, reference: str) -> Any:
    """Return the verifier, or the outcome model a reference names."""
    if reference == "verifier":
        return member("rewards", "verifier")(ctx)
    return member("rewards", "model")(ctx, reference)


def teacher_of(ctx: Context, model: Any, name: str, teacher: Teacher, asks: Asks) -> Any:
    """Return the member of ``teachers/`` for what a reference names; a server is tried on what it
    will be asked."""
    for own, keys in teacher.scored_by.items():
        return member("teachers", own)(keys, ctx, model, name, teacher.model)
    if references.parse(teacher.model).form != "server":
        return member("teachers", "local")(ctx, model, name, teacher.model)
    return member("teachers", "server")(ctx, model, name, teacher.address, asks)


def teacher_asks(model: Any, needs: set[str], top: int) -> Asks:
    """Return what a stage with these needs asks of its teachers."""
    which = {about for name, about in map(parse_need, needs) if name == "student.hidden"}
    layers = layers_of(model, which) if which else None
    compared = {"teacher.hidden{" + about + "}" for about in which}
    names = named(needs - compared, "teacher")
    head = bool({HIDDEN, TOPK_LIST} & names)  # logits are rebuilt
    if layers:
        names |= {INNER} if layers.inner else set()
        names |= {HIDDEN} if layers.depth in layers.selected else set()
    return Asks(frozenset(names), top, layers, head)


def policy_asks(needs: set[str], several: bool, top: int) -> Asks:
    """Return what a no-grad pass of the student before the update is for.

    Args:
        several: the step makes several updates, so the policy that sampled is not the one trained.
        top: k of the overlap with the teacher.
    """
    kinds = {"kl": HIDDEN, "overlap": TOPK}
    names = {kinds.get(name, name) for name in named(needs, "policy")}
    if "old.logprobs" in needs and several:
        names.add("logprobs")
    return Asks(frozenset(names), top)


def on_policy(ctx: Context, model: Any, teachers: dict[str, Teacher]) -> TrainSetup:
    """Return the setup of a stage whose student samples: rl and opd.

    Raises:
        UsageError: the student cannot be taught by its teachers; see ``preflight/``.
    """
    config = ctx.config
    terms = terms_of(config.objectives)
    signals = {
        n: (c.coef, member("signals", n)(c, ctx)) for n, c in config.signals.items() if c.coef
    }
    needs, sources = needs_in(terms, signals), config.sources
    compared = _listed_by_weights(config)
    top = max([0, *(t.objective.config.k for t in terms), *compared])
    asks = teacher_asks(model, needs, top)
    reference_asks = Asks(frozenset(named(needs, "reference")))
    rewards = _rewards(ctx, config)
    reference, route, members = None, {}, {}
    if reference_asks:
        reference = member("teachers", "local")(ctx, model, "reference", config.reference)
    if asks or sources:
        members = {n: (teacher_of(ctx, model, n, t, asks), t.weight) for n, t in teachers.items()}
        if all("teacher.hidden" in t.provides for t, _ in members.values()):
            asks = asks.rebuilding()  # entropy has a column too
        route = routes(ctx.recipe.domains(ctx.name), teachers)
        ctx.inspect(model)
    updates, minibatches = config.epochs, config.minibatches
    return TrainSetup(
        source=source_of(ctx, model, sources)
        if sources
        else member("sources", "student")(None, ctx, model),
        terms=terms,
        controllers={
            n: member("controllers", n)(c, ctx, model) for n, c in config.controllers.items()
        },
        signals=signals,
        rewards=rewards,
        teachers=members if asks else {},
        reference=reference,
        route=route,
        teacher_asks=asks,
        reference_asks=reference_asks,
        policy_asks=policy_asks(needs, updates * minibatches > 1, max(compared, default=16)),
        policy_kl_top=_kl_top(signals) if "policy.kl" in needs else None,
        judged="verdict" in needs,
        temperature=config.loss_temperature or config.sampling.temperature,
        sampled_at=config.sampling.temperature,
        steps=config.steps or 1,  # gradients has batches, all of the same weights
        updates=updates,
        minibatches=minibatches,
    )


def _listed_by_weights(config: Any) -> list[int]:
    """Return how many of the most probable ids each weight compares."""
    weights = [w for o in config.objectives.values() if o.coef for w in o.weights.values()]
    return [w.k for w in weights if has_key(w, "k")]


def _rewards(ctx: Context, config: Any) -> list[Any]:
    signals = [c for c in config.signals.values() if c.coef and c.reward]
    return [reward_of(ctx, c.reward) for c in signals]


def _kl_top(signals: dict[str, tuple[float, Any]]) -> int:
    """Return k of the policy's divergence as a baseline reads it; 0 is the whole vocabulary."""
    baseline = next((s.config for _, s in signals.values() if "policy.kl" in s.needs), None)
    return baseline.k if baseline and baseline.support != "full" else 0
