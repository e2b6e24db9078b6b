"""Estimate the work of a stage in tokens, from its keys and without data.

The ledger of a finished stage (``types.Compute``) counts the same tokens; lengths that only a run
can tell are assumed here (``cost.ASSUMED``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from opdctl.config import references
from opdctl.config.settings import longest_turn
from opdctl.config.shapes import Shape
from opdctl.estimate.rollout import PROMPT, Responses, mean_length

DEMONSTRATION = 512  # tokens of an answer that the data gives


@dataclass
class Work:
    """The work of a stage.

    Attributes:
        samples: the responses that each model writes.
        scored: ``(model, tokens)`` of each forward pass without gradients.
        trained: tokens that are trained on, every pass counted.
        longest: tokens of the longest response that is trained on.
    """

    samples: list[Responses] = field(default_factory=list)
    scored: list[tuple[Shape, float]] = field(default_factory=list)
    trained: float = 0.0
    longest: int = DEMONSTRATION


def stage_work(
    config: Any, domains: dict[str, float], student: Shape, shapes: dict[str, Shape]
) -> Work:
    """Estimate the work of a stage from its keys.

    Args:
        domains: domain -> share of each step.
        student: the size of the model that the stage trains.
        shapes: the size of every model the stage names, except those behind a server, which are not
            counted.
    """
    kind = config.kind
    if kind == "merge":
        return Work()
    if kind == "evaluate":
        batch = config.prompts.limit * config.prompts.samples
        return Work([Responses(student, len(domains), batch, config.sampling.max_tokens)])
    rounds = config.batches if kind == "gradients" else config.steps
    batch = config.prompts.per_step * config.prompts.samples
    if kind == "pretrain":
        return Work(trained=rounds * batch * (PROMPT + DEMONSTRATION))
    if kind == "sft":
        return _imitation(config, domains, rounds, batch, shapes)
    judge = shapes[config.policy] if kind == "orm" else student
    samples, tokens = _on_policy(config, domains, rounds, batch, judge, shapes)
    if kind == "orm":
        return Work(samples, trained=tokens, longest=longest_turn(config))
    scored = _scored(config, domains, tokens, shapes)
    passes = config.epochs
    if passes * config.minibatches > 1:
        scored.append((student, tokens))  # the log-probs before the first update
    if kind == "gradients":
        passes = sum(o.coef > 0 for o in config.objectives.values())
    scoring = [  # of the weights at steps 2^n and of each candidate, where all are tried
        Responses(student, rounds.bit_length() * (c.candidates + 1), c.size, longest_turn(config))
        for c in config.controllers.values()
        if c.candidates
    ]
    return Work([*samples, *scoring], scored, tokens * passes, longest_turn(config))


def behind_server(reference: str) -> bool:
    """Return True for a model behind a server: its memory and work are not counted."""
    return references.parse(reference).form == "server"


def _on_policy(
    config, domains, rounds: int, batch: int, student: Shape, shapes: dict
) -> tuple[list[Responses], float]:
    """Return the responses of an on-policy stage by model, and their tokens with the prompts'."""
    longest, sources = longest_turn(config), config.sources
    whole = Responses(student, rounds, batch, longest)
    if "teacher_mixed" in sources:  # both models read every token
        read = _by_teacher(config, domains, batch, shapes)
        samples = [whole, *(Responses(model, rounds, n, longest) for model, n in read)]
        return samples, whole.responses * (PROMPT + whole.mean)
    if not (mixture := sources.get("mixture")):
        return [whole], whole.responses * (PROMPT + whole.mean)
    theirs = sum(mixture.teacher * mixture.decay**step for step in range(rounds)) / max(1, rounds)
    shown = mixture.dataset * rounds * batch
    written = [(student, batch * (1 - theirs - mixture.dataset))]
    written += _by_teacher(config, domains, batch * theirs, shapes)
    samples = [Responses(m, rounds, max(1, round(n)), longest) for m, n in written if n > 1e-9]
    tokens = sum(s.responses * (PROMPT + s.mean) for s in samples)
    return samples, tokens + shown * (PROMPT + DEMONSTRATION)


def _by_teacher(config, domains, batch: float, shapes: dict) -> list[tuple[Shape, float]]:
    """Split the tokens of a batch by teacher, in the shares of its domains; without servers."""
    tokens_by_teacher = []
    for name, teacher in config.teachers.items():
        if behind_server(teacher.model):
            continue
        shape = shapes[config.student if teacher.model == "policy" else teacher.model]
        served = [d for d, on in teacher.serves.items() if on] or [name]
        share = sum(domains.get(d, 0.0) for d in served)
        alone = len(config.teachers) == 1 and not share
        tokens_by_teacher.append((shape, batch * (1.0 if alone else share)))
    return tokens_by_teacher


def _imitation(config, domains, rounds: int, batch: int, shapes: dict) -> Work:
    """Estimate an sft stage: a teacher samples its share of each step, its experts those of their
    domains, and the data gives the rest."""
    teacher = config.sources.get("teacher")
    shares: dict[str, float] = {}  # of each step, by who samples it
    if teacher:
        own_domains = {d for d, on in teacher.domains.items() if on}
        other_domains = {d for n, s in config.sources.items() if n != "teacher" for d in s.domains}
        for domain, share in domains.items():
            if domain in own_domains if own_domains else domain not in other_domains:
                expert = teacher.experts.get(domain, teacher.model)
                shares[expert] = shares.get(expert, 0.0) + share
    shown = rounds * batch * (1 - sum(shares.values()))
    work = Work(trained=shown * (PROMPT + DEMONSTRATION))
    for expert, share in shares.items():
        work.longest = longest = teacher.sampling.max_tokens
        each = max(1, round(batch * share))
        work.trained += rounds * each * (PROMPT + mean_length(longest))
        if expert in shapes:
            work.samples.append(Responses(shapes[expert], rounds, each, longest))
    return work


def _scored(config, domains, tokens: float, shapes: dict) -> list[tuple[Shape, float]]:
    """Return the scored tokens by model: a teacher scores its domains, a reference and a reward
    model everything."""
    scored = _by_teacher(config, domains, tokens, shapes)
    if reference := config.reference:
        scored.append((shapes[config.student if reference == "policy" else reference], tokens))
    for signal in config.signals.values():
        loaded = references.parse(signal.reward).form in ("stage", "folder", "public")
        if signal.coef and signal.reward and loaded:
            scored.append((shapes[signal.reward], tokens))
    return scored
