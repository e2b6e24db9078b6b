"""Compare the memory that the stage will hold at once with that of the device or the machine.

The formula and its assumptions stand in ``estimate/memory.py``. A base with all of its adapters
counts once, judges count as teachers do, and every prompt is taken to be as long as the longest of
a sample. An engine with weights of its own keeps no cache here: vllm has its share of the GPU, a
server has none. Not counted: memory of vllm on a CPU, activations, a reward model, the hidden rows
kept for teachers, a controller's copies of weights, other stages at the same time.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from opdctl.checks.preflight._checked_stage import CheckedStage
from opdctl.config import references
from opdctl.config.registry import member
from opdctl.config.settings import longest_turn
from opdctl.estimate.memory import (
    BYTES,
    Estimate,
    engine_bytes,
    estimate,
    format_bytes,
    student_bytes,
)
from opdctl.estimate.shape import cached_numbers
from opdctl.protocols import Check
from opdctl.types import Finding

PROMPTS = 16  # of each domain, for their length


class Memory(Check):
    """The parameters, gradients, moments, teachers, logits and cache fit the device."""

    revision = 1
    samples = False
    why = (
        "a student that fits alone runs out of memory beside its teacher, often late in the first "
        "step (github.com/modelscope/ms-swift/issues/6639)"
    )

    def findings(self, stage: CheckedStage) -> list[Finding]:
        """Return one finding for the stage."""
        there = capacity(stage.ctx.device)
        held, vllm = stage_memory(stage), stage.ctx.runtime.engine == "vllm"
        sampling = "vllm's share" if vllm else "cache of a wave"
        message = (
            f"about {format_bytes(held.peak)} of {format_bytes(there)} on {stage.ctx.device}: "
            f"parameters {format_bytes(held.parameters)}, gradients "
            f"{format_bytes(held.gradients)}, moments {format_bytes(held.moments)}, teachers "
            f"{format_bytes(held.teachers)}, logits of a chunk {format_bytes(held.chunk)}, "
            f"{sampling} {format_bytes(held.cache)}; without activations"
        )
        if held.certain > there:
            do = "a smaller model or a larger device; runtime.dtype=bfloat16 halves all of it"
            if held.teachers > held.parameters:
                do = f"runtime.resident_teachers=1, or {do}"
            return [Finding("error", message, do)]
        if held.peak > 0.9 * there:
            cache = held.cache > held.gradients + held.chunk
            smaller = "engine_args.gpu_memory_utilization" if vllm else "rollout_batch"
            do = f"a smaller runtime.{smaller if cache else 'chunk_mib'}"
            return [Finding("warning", message, f"{do}, or runtime.resident_teachers=1")]
        return [Finding("ok", message)]


def stage_memory(stage: CheckedStage) -> Estimate:
    """Return the estimate for a stage; ``estimate/memory.py`` says what is assumed."""
    config, runtime, student = stage.ctx.config, stage.ctx.runtime, stage.student
    each = BYTES[runtime.dtype]
    ctx = stage.ctx
    held = {ctx.models.path_of(r): stage.outline(n) for n, r in stage.teachers.items()}
    if stage.policy:
        held[ctx.models.path_of(config.student)] = student
    for dotted, judge in ctx.recipe.references(ctx.name):
        if dotted.startswith("data."):  # of a verifier
            held[ctx.models.path_of(judge)] = stage.outline_of(judge)
    places: dict[str, int] = {}
    for path, model in held.items():  # the outline of an adapter is that of its base
        base = references.base_of(path)
        bytes_of_it: int = model.parameters * each
        whole = places.get(base or path, bytes_of_it)
        places[base or path] = whole + (adapter_bytes(path) if base else 0)
    prompts = [p for d in stage.route for p in stage.prompts(d, PROMPTS)]
    longest = max(len(student.render(p)) for p in prompts) + longest_turn(config)
    own = member("engines", runtime.engine).has_own_weights  # weights, and so the caches of them
    wave = min(runtime.rollout_batch, config.prompts.per_step * config.prompts.samples)
    return estimate(
        trained(stage),
        list(places.values()),
        dtype=runtime.dtype,
        learns=True,
        steps=config.optim is not None,
        resident=runtime.resident_teachers,
        chunk_mib=runtime.chunk_mib,
        device=stage.ctx.device,
        cached=per_token(student.net.config.get_text_config()),
        sampled=0 if own else wave * longest,
        engine=engine_bytes(runtime, capacity("cuda")) if ctx.device == "cuda" else 0,
    )


def trained(stage: CheckedStage) -> tuple[int, int, int]:
    """Return the bytes of the student's parameters, of its gradients and of the optimizer's
    state."""
    config, runtime, student = stage.ctx.config, stage.ctx.runtime, stage.student
    lora = config.lora
    if lora.rank:
        from opdctl.models.lora import adapter_parameters

        added = student.trained if student.adapter else adapter_parameters(student, lora)
        own = student.parameters - (added if student.adapter else 0)
        return student_bytes(own, runtime.dtype, adapter=added)
    masters = config.optim is not None and runtime.masters_of(config.optim.lr)
    return student_bytes(student.parameters, runtime.dtype, masters=masters)


def adapter_bytes(folder: str) -> int:
    """Return the bytes of an adapter in float32."""
    from safetensors import safe_open

    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        return sum(4 * math.prod(file.get_slice(n).get_shape()) for n in list(file.keys()))


def per_token(config) -> int:
    """Return how many numbers the cache of a model keeps for one token, in all layers."""
    return config.num_hidden_layers * cached_numbers(config.to_dict())


def capacity(device: str) -> int:
    """Return the bytes of the GPU, or of the machine as far as this process may use it."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[1]
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(machine, int(text)) if text.isdigit() else machine
