"""Prompts -> rollouts: render, give each sample its draws, sample, decode."""

from __future__ import annotations

from collections import Counter

from opdctl.core import draws
from opdctl.registry import member
from opdctl.types import Prompt, Rollout


def sample_group(
    ctx, model, prompts: list[Prompt], step: int, source: str, *, sampling=None, samples: int = 0
) -> list[Rollout]:
    """``samples`` responses to each prompt, a prompt's responses next to each other.

    Args:
        ctx: gives the stage seed, the wave size and the stop flag.
        step: part of every draw's name, and the version of the weights.
        sampling: defaults to the stage's ``sampling``.
        samples: defaults to the stage's ``prompts.samples``.

    Raises:
        Interrupted: a stop was asked for.
    """
    sampling = sampling or ctx.config.sampling
    samples = samples or ctx.config.prompts.samples
    engine = member("engines", "transformers")(model, ctx.runtime.wave, ctx.check)
    rendered = [model.render(p.text) for p in prompts]
    where = [(g, s) for g in range(len(prompts)) for s in range(samples)]
    times: Counter[str] = Counter()  # a small pool may give a prompt twice in one step
    first = []
    for prompt in prompts:
        first.append(times[prompt.id] * samples)
        times[prompt.id] += 1
    keys = [draws.key(ctx.seed, step, prompts[g].id, first[g] + s) for g, s in where]
    drawn = engine.generate(
        [rendered[g] for g, _ in where],
        keys,
        temperature=sampling.temperature,
        max_tokens=sampling.max_tokens,
    )
    return [
        Rollout(
            prompts[g],
            rendered[g],
            sample.ids,
            sample.logprobs,
            sample.truncated,
            source,
            group=g,
            version=step,
            text=model.decode(sample.ids),
        )
        for (g, _), sample in zip(where, drawn, strict=True)
    ]
