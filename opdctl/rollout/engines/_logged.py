"""The responses of engines that finish them one by one: each is logged as it comes.

A response is logged under all that determines it, so one that an earlier attempt finished is not
sampled again.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any, Protocol

from opdctl import draws
from opdctl.rollout.engines._engine import Sample

Finished = Generator[tuple[int, Sample], None, None]


def is_trained(model) -> bool:
    """Return True if a model's weights change between publications."""
    return any(p.requires_grad for p in model.net.parameters())


class PublishingEngine(Protocol):
    """An engine that samples from weights which are published to it.

    Attributes:
        wal: the log; None logs nothing.
        published: the version of the weights.
        trained: the weights change between publications.
    """

    model: Any
    wal: Any
    published: int | str | None
    trained: bool


def sampled_or_logged(
    engine: PublishingEngine,
    requests: list[tuple[list[int], int]],
    run: Callable[[list[int]], Finished],
    temperature: float,
    max_tokens: int,
) -> list[Sample]:
    """Return one sample for each request, out of the engine's log where it is there.

    Args:
        requests: a prompt and the key of its draws each.
        run: samples the requests at these places, and yields each place with its sample as it is
            finished; closed when that is cut.
    """
    wal, ends = engine.wal, engine.model.ends
    weights = (engine.model.name, engine.published if engine.trained else None)
    names = [
        f"response {draws.key(*weights, p, k, temperature, max_tokens):016x}" for p, k in requests
    ]
    logged = {place: logged_sample(wal, name, ends) for place, name in enumerate(names)}
    samples = {place: sample for place, sample in logged.items() if sample is not None}
    todo = [place for place in logged if place not in samples]
    if todo:
        with closing(run(todo)) as finished:
            for place, sample in finished:
                samples[place] = sample
                if wal is not None:
                    wal.put(names[place], log_entry(sample))
    return [samples[place] for place in range(len(requests))]


def logged_sample(wal: Any, name: str, ends: tuple[int, ...]) -> Sample | None:
    """Return the sample that an earlier attempt finished and logged under a name, if it did."""
    entries = wal.get(name) if wal else []
    if not entries:
        return None
    ids, logprobs = entries[0]["tokens"].tolist(), entries[0]["logprobs"].tolist()
    return Sample(ids, logprobs, ids[-1] not in ends)


def log_entry(sample: Sample) -> dict:
    """Return the log's entry of a finished response."""
    import numpy as np

    return {"tokens": np.array(sample.ids), "logprobs": np.array(sample.logprobs)}
