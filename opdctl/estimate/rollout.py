"""Estimate the seconds of sampling on a GPU, by the transformers engine or by vLLM.

One token of every response needs the weights and all keys and values read once. The assumptions on
lengths and utilisation are printed with the estimate (``cost.ASSUMED``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from opdctl.config.shapes import Shape
from opdctl.estimate.gpus import Gpu
from opdctl.types import FORWARD

AT_ONCE = 128  # requests that a server is sent before the first is answered
PROMPT = 256  # tokens of a rendered prompt
LENGTH = 0.5  # a sampled response, as a share of sampling.max_tokens
DECODE = 0.5  # of the bandwidth: one token of every response of a wave
LAUNCH = 5e-4  # seconds a layer and token: launching kernels one by one, whatever the batch
GRAPH = 1e-4  # vllm's, which captures them in a graph


def mean_length(longest: int) -> float:
    """Return the tokens that a response of at most ``longest`` is assumed to have."""
    return max(1.0, LENGTH * longest)


@dataclass
class Responses:
    """The responses that one model of a stage writes: ``rounds`` times ``batch`` of them.

    Attributes:
        longest: the most tokens of one.
    """

    model: Shape
    rounds: int
    batch: float
    longest: int

    @property
    def mean(self) -> float:
        """The tokens of a response, as assumed."""
        return mean_length(self.longest)

    @property
    def responses(self) -> float:
        return self.rounds * self.batch


def decode_seconds(s: Responses, wave: int, each: int, gpu: Gpu, peak: float) -> float:
    """Return the seconds of the transformers engine, wave after wave.

    A wave reads its prompts once, then decodes a token of every response at a time until the
    longest has ended. The batch shrinks as responses end: on average the share LENGTH of it is
    active.

    Args:
        wave: most responses at once.
        each: bytes of a parameter.
        peak: operations per second.
    """
    waves = s.rounds * math.ceil(s.batch / wave)
    alive = LENGTH * min(s.batch, wave)
    read = each * (s.model.per_token + alive * s.model.cached * (PROMPT + s.mean / 2))
    step = max(
        read / (DECODE * gpu.bandwidth),
        FORWARD * s.model.per_token * alive / peak,
        LAUNCH * s.model.layers,
    )
    prompts = FORWARD * s.model.per_token * s.responses * PROMPT / peak
    return prompts + waves * s.longest * step


def served_seconds(
    s: Responses, most: int, each: int, gpu: Gpu, peak: float, memory: float
) -> float:
    """Return the seconds of an engine that begins a response as soon as another has ended.

    Args:
        most: most responses at once.
        each: bytes of a parameter.
        peak: operations per second.
        memory: bytes for weights, keys and values; they bound the responses at once too.
    """
    held = each * s.model.cached * (PROMPT + s.mean / 2)
    room = (memory - each * s.model.parameters) / held if held else most
    alive = max(1.0, min(most, s.batch, room))
    read = each * s.model.per_token + alive * held
    step = max(
        read / (DECODE * gpu.bandwidth),
        FORWARD * s.model.per_token * alive / peak,
        GRAPH * s.model.layers,
    )
    prompts = FORWARD * s.model.per_token * s.responses * PROMPT / peak
    return prompts + s.rounds * max(s.longest, s.batch * s.mean / alive) * step
