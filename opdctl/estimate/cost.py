"""Estimate the memory and time of a stage on one GPU, from its work (``work.py``).

The ledger of a finished stage (``types.Compute``) counts with the same factors; utilisations are
assumed (``ASSUMED``). Left out: loading, checkpoints, verifiers, the preflight, and time between
stages.

    opdctl plan qwen3 --size small --gpu h100
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from opdctl.config import references
from opdctl.config.settings import Prompts
from opdctl.estimate.gpus import Gpu
from opdctl.estimate.memory import BYTES, SHARE, Estimate, engine_bytes, estimate, student_bytes
from opdctl.estimate.rollout import (
    AT_ONCE,
    DECODE,
    GRAPH,
    LAUNCH,
    LENGTH,
    PROMPT,
    Responses,
    decode_seconds,
    served_seconds,
)
from opdctl.estimate.shape import (
    HeldModel,
    adapter_parameters,
    held_model,
    pretrain_shape,
    with_adapter,
)
from opdctl.estimate.work import DEMONSTRATION, Work, behind_server, stage_work
from opdctl.types import FORWARD, TRAIN

COMPUTE = 0.4  # of the peak of multiplications: prompts, scoring, training
SERVER = 0.9  # of its own GPU that a vllm server takes, vllm's default for some time
ASSUMED = (
    "parameters, gradients and two moments of AdamW in runtime.dtype; in float32 for copies of "
    "bfloat16 parameters (runtime.master_weights) and adapters on every linear layer; keys and "
    "values of a wave of "
    "responses of the full sampling.max_tokens (of the most that a controller may make of it); "
    "activations of a micro-batch (runtime.micro_batch=0: of all sequences of an optimizer step, "
    "as if alike in length), all of them unless runtime.gradient_checkpointing; "
    f"prompts of {PROMPT} tokens, demonstrations of {DEMONSTRATION}, responses of {LENGTH:.0%} of "
    f"sampling.max_tokens; {FORWARD:g} operations a parameter and token forward, {TRAIN:g} in "
    f"training ({TRAIN - FORWARD:g} where an adapter alone is trained, and {FORWARD:g} of its own; "
    "none for what runtime.gradient_checkpointing computes again), "
    f"at {COMPUTE:.0%} of the GPU's dense peak in runtime.dtype; decoding at "
    f"{DECODE:.0%} of its bandwidth, and no faster than {1e3 * LAUNCH:g} ms a layer and token "
    f"(transformers) or {1e3 * GRAPH:g} ms (vllm, which has {SHARE:.0%} of the GPU and begins a "
    f"response where another ends); one GPU, and {SERVER:.0%} of another like it where "
    "runtime.engine is vllm_server; nothing measured. Not counted: loading, checkpoints, "
    "verifiers, models behind a server, teachers' kept hidden rows."
)


@dataclass
class Cost:
    """The memory and time of a stage on a GPU.

    Attributes:
        memory: bytes by purpose.
        seconds: by phase: rollout, score, train.
        flops: operations of all phases.
        fits: True where the peak is within the GPU's memory.
        unknown: the parts left out, since no shape gives them or a server does them, in words.
    """

    memory: Estimate
    seconds: dict[str, float]
    flops: float
    fits: bool
    unknown: str

    def to_dict(self) -> dict:
        """Return the entry of ``plan --json``: bytes and seconds."""
        memory = {**asdict(self.memory), "peak": self.memory.peak}
        return {**asdict(self), "memory": memory}


@dataclass
class Costs:
    """The memory and time of every stage of a recipe on a GPU.

    Attributes:
        stages: stage -> its cost, or the reason why it is not known.
    """

    gpu: Gpu
    stages: dict[str, Cost | str]
    assumed: str = ASSUMED

    def of(self, stage: str) -> dict:
        """Return the entry of a stage in ``plan --json``."""
        cost = self.stages[stage]
        return {"unknown": cost} if isinstance(cost, str) else cost.to_dict()


def costs(recipe: Any, gpu: Gpu) -> Costs:
    """Estimate every stage, in the order they run."""
    return Costs(gpu, {stage: cost(recipe, stage, gpu) for stage in recipe.order()})


def cost(recipe: Any, stage: str, gpu: Gpu) -> Cost | str:
    """Estimate the memory and time of a stage, or return the reason why they are not known."""
    config, runtime = recipe.stages[stage], recipe.runtime
    every = recipe.references(stage)  # those of its verifiers too
    texts = [t for k, t in every if k != "template"]  # of that the tokenizer alone
    away = list(dict.fromkeys(filter(behind_server, texts)))
    named = [t for t in texts if t not in away and references.parse(t).form != "unknown"]
    held = {text: held_model(recipe, text, stage) for text in named}  # the verifier is no model
    bases = {text: s.base for text, s in held.items() if s.base is not None}
    if missing := [s.place for text, s in held.items() if text not in bases]:
        return f"no size of {missing[0]}; shapes: {{{missing[0]}: {{parameters: N, layers: N}}}}"
    shapes = {text: with_adapter(base, held[text].adapter) for text, base in bases.items()}
    start, rank = config.student, config.lora.rank
    alone = bool(rank)  # an adapter is trained and nothing else
    merged = config.kind != "evaluate" and not alone  # an evaluation takes an adapter as it is
    adapter = 0.0 if merged or not start else adapter_parameters(held[start], rank)
    student = with_adapter(bases[start], adapter) if start else pretrain_shape(config.model)
    work = stage_work(config, recipe.domains(stage), student, shapes)
    wave, longest = _wave(work, runtime.rollout_batch)
    apart, share = runtime.engine == "vllm_server", engine_bytes(runtime, gpu.memory)
    learns = work.trained > 0
    beside = [t for k, t in every if k not in ("student", "template")]
    frozen = [held[t] for t in dict.fromkeys(beside) if t in held]  # of the student: a copy
    memory = estimate(
        student_bytes(
            student.parameters - adapter,
            runtime.dtype,
            masters=config.optim is not None and runtime.masters_of(config.optim.lr),
            adapter=adapter if alone or adapter else None,
        ),
        _frozen_bytes(frozen, BYTES[runtime.dtype]),
        dtype=runtime.dtype,
        learns=learns,
        steps=config.optim is not None,
        resident=1 if config.kind == "merge" else runtime.resident_teachers,
        chunk_mib=runtime.chunk_mib,
        cached=max((s.model.cached for s in work.samples), default=0),
        sampled=0 if apart else wave * (PROMPT + longest),
        engine=share if work.samples else 0,
        activated=student.activated(runtime.gradient_checkpointing),
        trained=(runtime.micro_batch or _largest_pass(config)) * (PROMPT + work.longest),
    )
    trained_flops = update_flops(student.per_token, adapter if alone else None)
    flops, seconds = _flops_and_seconds(work, runtime, gpu, trained_flops)
    blind = any(s.model.layers == 0 for s in work.samples) or (learns and not student.layers)
    unknown = ["cache and activations: a shape has no layers"] if blind else []
    unknown += ["the adapter: a shape has no layers or hidden"] if alone and not adapter else []
    unknown += [f"{text} is behind a server: not counted" for text in away]
    fits = memory.peak <= gpu.memory
    return Cost(memory, seconds, sum(flops.values()), fits, "; ".join(unknown))


def _flops_and_seconds(
    work: Work, runtime: Any, gpu: Gpu, trained_flops: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the operations and the seconds of a stage by phase.

    Args:
        trained_flops: operations of an update per token.
    """
    each = BYTES[runtime.dtype]
    peak = COMPUTE * gpu.flops[runtime.dtype]
    flops = {
        "rollout": sum(
            FORWARD * s.model.per_token * s.responses * (PROMPT + s.mean) for s in work.samples
        ),
        "score": sum(FORWARD * model.per_token * tokens for model, tokens in work.scored),
        "train": trained_flops * work.trained,
    }
    seconds = {
        "rollout": sum(_sampling(s, runtime, each, gpu, peak) for s in work.samples),
        "score": flops["score"] / peak,
        "train": flops["train"] / peak,
    }
    return flops, seconds


def _sampling(s: Responses, runtime: Any, each: int, gpu: Gpu, peak: float) -> float:
    """Return the seconds of the run's engine; a server has a GPU of the same kind to itself."""
    if runtime.engine == "vllm_server":
        return served_seconds(
            s, min(runtime.rollout_batch, AT_ONCE), each, gpu, peak, SERVER * gpu.memory
        )
    if share := engine_bytes(runtime, gpu.memory):
        return served_seconds(s, runtime.rollout_batch, each, gpu, peak, share)
    return decode_seconds(s, runtime.rollout_batch, each, gpu, peak)


def update_flops(each: float, adapter: float | None) -> float:
    """Return the operations of an update per token, as the ledger counts them.

    With an adapter the backward pass goes through everything, and to the gradient of the adapter
    only (``models/model.Model.count``).

    Args:
        each: parameters that a token meets.
        adapter: parameters of an adapter trained alone; None trains all.
    """
    return TRAIN * each if adapter is None else (TRAIN - FORWARD) * each + FORWARD * adapter


def _frozen_bytes(frozen: list[HeldModel], each: int) -> list[float]:
    """Return the bytes of each frozen base together with its adapters, which are in float32."""
    held = {s.place: each * s.base.parameters for s in frozen if s.base is not None}
    for (place, _), adapter in {(s.place, s.name): 4 * s.adapter for s in frozen}.items():
        held[place] += adapter
    return list(held.values())


def _largest_pass(config: Any) -> int:
    """Return the most sequences of one pass where ``runtime.micro_batch`` is 0.

    They are all those of an optimizer step, if alike in length: ``models/packing.micro_batches``
    closes no group of them.
    """
    prompts = config.prompts
    whole = prompts.per_step * prompts.samples if isinstance(prompts, Prompts) else 0
    return math.ceil(whole / config.minibatches)


def _wave(work: Work, most: int) -> tuple[float, int]:
    """Return the number of responses at once, and the tokens of the longest."""
    batch = max((min(s.batch, most) for s in work.samples), default=0)
    return batch, max((s.longest for s in work.samples), default=0)
