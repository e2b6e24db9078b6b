"""Prompts -> rollouts: render, give each sample its draws, sample and decode, turn by turn.

In a domain with an environment, a turn that makes a call is answered and the response goes on; the
answer's tokens are context. A later turn continues the exact ids of the turns before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from opdctl import draws
from opdctl.config.settings import longest_turn
from opdctl.types import Prompt, Rollout


def sample_group(
    ctx,
    model,
    prompts: Sequence[Prompt],
    step: int,
    source: str,
    *,
    sampling=None,
    samples: int = 0,
    blend: tuple[Any, float] | None = None,
    purpose: str = "",
    version: str = "",
) -> list[Rollout]:
    """Sample ``samples`` responses to each prompt, those of a prompt next to each other.

    Args:
        ctx: gives the stage seed, the engine, the environments, the log and the stop flag.
        step: part of every draw's name, and the version of the weights.
        source: the name of the source, as the rollouts carry it.
        sampling: defaults to the stage's ``sampling`` with its current limit.
        samples: defaults to the stage's ``prompts.samples``.
        blend: another model and its share in every token; transformers engine only.
        purpose: a name for draws that are not the step's own; "" is the step's rollouts.
        version: the name of the weights, if they are not those of the step.

    Raises:
        Interrupted: a stop was asked for.
    """
    rollouts, keys = empty_rollouts(ctx, model, prompts, step, source, samples, purpose)
    ctx.wal.at(step)
    engine = ctx.models.engine(model, blend)
    engine.publish(version or step)
    _sample_turns(ctx, engine, model, rollouts, keys, sampling or ctx.sampling)
    engine.release()
    return rollouts


def finish_rollouts(ctx, model, rollouts: list[Rollout], keys: list[int]) -> None:
    """Finish responses whose first tokens are there already, with the stage's sampling.

    A finished response is at most as long as one sampled from its first token. No environment may
    have answered yet.

    Args:
        keys: 64 bits each, which determine the draws.

    Raises:
        Interrupted: a stop was asked for.
    """
    ctx.wal.at(0)
    sampling = replace(ctx.config.sampling, max_tokens=longest_turn(ctx.config))
    engine = ctx.models.engine(model)
    engine.publish(0)
    waiting: dict[int, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        room = sampling.max_tokens - len(rollout.response_ids)
        rollout.truncated = not room and rollout.response_ids[-1] not in model.ends
        if room and (not rollout.response_ids or rollout.response_ids[-1] not in model.ends):
            waiting.setdefault(room, []).append(i)
    for room, indices in sorted(waiting.items(), reverse=True):
        some_keys = [keys[i] for i in indices]
        _sample_turn(engine, model, [rollouts[i] for i in indices], 0, some_keys, sampling, room)
    for rollout in rollouts:
        rollout.text = model.decode(rollout.response_ids)
    _sample_turns(ctx, engine, model, rollouts, keys, sampling, begun=True)
    engine.release()


def _sample_turns(
    ctx, engine, model, rollouts, keys: list[int], sampling, begun: bool = False
) -> None:
    """Sample turn by turn to the end; with ``begun`` the first turn is there already."""
    environments = {d: ctx.prompts.environment(d) for d in {r.prompt.domain for r in rollouts}}
    going, turn = list(range(len(rollouts))), 0
    while going:
        if turn or not begun:
            unfinished, turn_keys = [rollouts[i] for i in going], [keys[i] for i in going]
            _sample_turn(engine, model, unfinished, turn, turn_keys, sampling)
        going = [i for i in going if append_reply(rollouts[i], turn, environments, model)]
        turn += 1


def empty_rollouts(
    ctx,
    model,
    prompts: Sequence[Prompt],
    step: int,
    source: str,
    samples: int = 0,
    purpose: str = "",
) -> tuple[list[Rollout], list[int]]:
    """Return the rollouts of a step before anything is sampled, and the key of each one's draws."""
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


def _sample_turn(
    engine, model, rollouts, turn: int, keys: list[int], sampling, room: int = 0
) -> None:
    """Sample one more turn of each rollout and append it."""
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


def append_reply(rollout: Rollout, turn: int, environments: dict[str, Any], model) -> bool:
    """Append the environment's answer to the turn; return False if it has none."""
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
