"""Prompts -> rollouts: render, give each sample its draws, sample, decode; turn by turn.

Where a domain has an environment, a turn that makes a call is answered and the response goes on;
the answer's tokens are context. A later turn starts from the very ids of those before it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from opdctl import draws
from opdctl.config.settings import longest_turn
from opdctl.types import Prompt, Rollout


def sample_group(
    ctx,
    model,
    prompts: list[Prompt],
    step: int,
    source: str,
    *,
    sampling=None,
    samples: int = 0,
    blend: tuple[Any, float] | None = None,
    purpose: str = "",
    version: str = "",
) -> list[Rollout]:
    """``samples`` responses to each prompt, a prompt's responses next to each other.

    Args:
        ctx: gives the stage seed, the engine, the environments, the log and the stop flag.
        step: part of every draw's name, and the version of the weights.
        sampling: defaults to the stage's ``sampling``, as it is now.
        samples: defaults to the stage's ``prompts.samples``.
        blend: another model and its share in every token; by the transformers engine.
        purpose: draws are of this use of the step, not its own; none is the step's rollouts.
        version: names the weights where they are not those of the step.

    Raises:
        Interrupted: a stop was asked for.
    """
    rollouts, keys = unanswered(ctx, model, prompts, step, source, samples, purpose)
    ctx.wal.at(step)
    engine = ctx.engine(model, blend)
    engine.publish(version or step)
    _turns(ctx, engine, model, rollouts, keys, sampling or ctx.sampling)
    engine.rest()
    return rollouts


def continued(ctx, model, rollouts: list[Rollout], keys: list[int]) -> None:
    """Finish responses whose first tokens stand there already: with the stage's sampling, cut where
    a whole response would be at most. Nothing may have been observed yet.

    Args:
        keys: 64 bits each, that determine the draws.

    Raises:
        Interrupted: a stop was asked for.
    """
    ctx.wal.at(0)
    sampling = replace(ctx.config.sampling, max_tokens=longest_turn(ctx.config))
    engine = ctx.engine(model)
    engine.publish(0)
    waiting: dict[int, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        room = sampling.max_tokens - len(rollout.response_ids)
        rollout.truncated = not room and rollout.response_ids[-1] not in model.ends
        if room and (not rollout.response_ids or rollout.response_ids[-1] not in model.ends):
            waiting.setdefault(room, []).append(i)
    for room, some in sorted(waiting.items(), reverse=True):
        some_keys = [keys[i] for i in some]
        _turn(engine, model, [rollouts[i] for i in some], 0, some_keys, sampling, room)
    for rollout in rollouts:
        rollout.text = model.decode(rollout.response_ids)
    _turns(ctx, engine, model, rollouts, keys, sampling, begun=True)
    engine.rest()


def _turns(ctx, engine, model, rollouts, keys: list[int], sampling, begun: bool = False) -> None:
    """Turn by turn to the end; with ``begun`` from the answer to the first on."""
    environments = {d: ctx.environment(d) for d in {r.prompt.domain for r in rollouts}}
    going, turn = list(range(len(rollouts))), 0
    while going:
        if turn or not begun:
            some, some_keys = [rollouts[i] for i in going], [keys[i] for i in going]
            _turn(engine, model, some, turn, some_keys, sampling)
        going = [i for i in going if answered(rollouts[i], turn, environments, model)]
        turn += 1


def unanswered(
    ctx, model, prompts: list[Prompt], step: int, source: str, samples: int = 0, purpose: str = ""
) -> tuple[list[Rollout], list[int]]:
    """The rollouts of a step before anything is sampled, and the key of each one's draws."""
    samples = samples or ctx.config.prompts.samples
    times: Counter[str] = Counter()  # a small pool may give a prompt twice in one step
    rollouts: list[Rollout] = []
    keys: list[int] = []
    use = (ctx.seed, purpose, step) if purpose else (ctx.seed, step)
    for group, prompt in enumerate(prompts):
        ids = model.render(prompt)
        first = times[prompt.id] * samples
        times[prompt.id] += 1
        for s in range(samples):
            keys.append(draws.key(*use, prompt.id, first + s))
            new = Rollout(prompt, ids, [], [], source=source, group=group, version=step)
            rollouts.append(new)
    return rollouts, keys


def _turn(engine, model, rollouts, turn: int, keys: list[int], sampling, room: int = 0) -> None:
    """One more turn of each, appended."""
    drawn = engine.generate(
        [[*r.prompt_ids, *r.response_ids] for r in rollouts],
        [draws.key(k, "turn", turn) if turn else k for k in keys],
        temperature=sampling.temperature,
        max_tokens=room or sampling.max_tokens,
    )
    for rollout, sample in zip(rollouts, drawn, strict=True):
        rollout.response_ids = [*rollout.response_ids, *sample.ids]
        rollout.behaviour_logprobs += sample.logprobs
        rollout.truncated = sample.truncated
        rollout.text = model.decode(sample.ids)


def answered(rollout: Rollout, turn: int, environments: dict[str, Any], model) -> bool:
    """Whether the domain's environment answered the turn; if so its answer is appended."""
    environment = environments[rollout.prompt.domain]
    if environment is None or rollout.truncated or turn >= environment.turns:
        return False
    reply = environment.reply(rollout.text)
    if reply is None:
        return False
    end = len(rollout.response_ids)
    ids = model.observation(reply, environment.role, rollout.response_ids[-1], rollout.prompt)
    rollout.response_ids = [*rollout.response_ids, *ids]
    rollout.observed += ((end, end + len(ids)),)
    rollout.before += (rollout.text, reply)
    return True
