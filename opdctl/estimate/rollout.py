"""How long a GPU samples: by the transformers engine, wave after wave, or by vLLM.

A token of every response needs the weights and all keys and values read once; what is assumed of
lengths and of the device's use is printed with the estimate (``cost.ASSUMED``).
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


@dataclass
class Sampled:
    """Responses that one model of a stage writes: ``rounds`` times ``batch`` of them."""

    model: Shape
    rounds: int
    batch: int
    longest: int

    @property
    def mean(self) -> float:
        """Tokens of a response, as assumed."""
        return max(1.0, LENGTH * self.longest)

    @property
    def responses(self) -> int:
        return self.rounds * self.batch


def decode_seconds(s: Sampled, wave: int, each: int, gpu: Gpu, peak: float) -> float:
    """Prompts once, then a token of every response at a time until the longest is over.

    The batch shrinks as responses end: on average LENGTH of it is there.
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


def served_seconds(s: Sampled, most: int, each: int, gpu: Gpu, peak: float, memory: float) -> float:
    """As decode_seconds, by an engine that begins a response where another has ended.

    Args:
        most: responses at once.
        memory: bytes it has for weights, keys and values: they bound the responses at once too.
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
