"""What the stage will hold at once, against the device or the machine.

The formula and what it assumes stand in ``estimate/memory.py``; a base with all of its adapters
counts once, judges count as teachers do, and prompts are as long as the longest of those looked at.
An engine with weights of its own keeps no cache here: vllm has its share of the GPU, a server none.
Not counted: what vllm holds on a CPU, activations, a reward model, the teachers' kept hidden rows,
a controller's copies of weights, other stages at the same time.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from opdctl.checks.preflight._pairing import Pairing
from opdctl.config import references
from opdctl.config.registry import member
from opdctl.config.settings import longest_turn
from opdctl.estimate.memory import BYTES, Estimate, estimate, of_engine, of_student, shown
from opdctl.estimate.shape import kept_of
from opdctl.types import Finding

PROMPTS = 16  # of each domain, for their length


class Memory:
    """Parameters, gradients, moments, teachers, logits and cache fit the device."""

    revision = 1
    samples = False
    why = (
        "a student that fits alone runs out of memory beside its teacher, often late in the first "
        "step (github.com/modelscope/ms-swift/issues/6639)"
    )

    def look(self, pairing: Pairing) -> list[Finding]:
        """One finding a stage."""
        there = capacity(pairing.ctx.device)
        found, vllm = holds(pairing), pairing.ctx.runtime.engine == "vllm"
        sampling = "vllm's share" if vllm else "cache of a wave"
        what = (
            f"about {shown(found.peak)} of {shown(there)} on {pairing.ctx.device}: parameters "
            f"{shown(found.parameters)}, gradients {shown(found.gradients)}, moments "
            f"{shown(found.moments)}, teachers {shown(found.teachers)}, logits of a chunk "
            f"{shown(found.chunk)}, {sampling} {shown(found.cache)}; without activations"
        )
        if found.certain > there:
            do = "a smaller model or a larger device; runtime.dtype=bfloat16 halves all of it"
            if found.teachers > found.parameters:
                do = f"runtime.resident_teachers=1, or {do}"
            return [Finding("error", what, do)]
        if found.peak > 0.9 * there:
            cache = found.cache > found.gradients + found.chunk
            smaller = "engine_args.gpu_memory_utilization" if vllm else "wave"
            do = f"a smaller runtime.{smaller if cache else 'chunk_mib'}"
            return [Finding("warning", what, f"{do}, or runtime.resident_teachers=1")]
        return [Finding("ok", what)]


def holds(pairing: Pairing) -> Estimate:
    """See ``estimate/memory.py`` for what is assumed."""
    config, runtime, student = pairing.ctx.config, pairing.ctx.runtime, pairing.student
    each = BYTES[runtime.dtype]
    ctx = pairing.ctx
    held = {ctx.path_of(r): pairing.outline(n) for n, r in pairing.teachers.items()}
    if pairing.policy:
        held[ctx.path_of(config.student)] = student
    for dotted, judge in ctx.recipe.references(ctx.name):
        if dotted.startswith("data."):  # of a verifier
            held[ctx.path_of(judge)] = pairing.of(judge)
    places: dict[str, int] = {}
    for path, model in held.items():  # the outline of an adapter is that of its base
        base = references.base_of(path)
        whole = places.get(base or path, model.parameters * each)
        places[base or path] = whole + (adapter_bytes(path) if base else 0)
    prompts = [p for d in pairing.route for p in pairing.prompts(d, PROMPTS)]
    longest = max(len(student.render(p)) for p in prompts) + longest_turn(config)
    own = member("engines", runtime.engine).has_own_weights  # weights, and so the caches of them
    wave = min(runtime.wave, config.prompts.per_step * config.prompts.samples)
    return estimate(
        trained(pairing),
        list(places.values()),
        dtype=runtime.dtype,
        learns=True,
        steps=hasattr(config, "optim"),
        resident=runtime.resident_teachers,
        chunk_mib=runtime.chunk_mib,
        device=pairing.ctx.device,
        cached=per_token(student.net.config.get_text_config()),
        sampled=0 if own else wave * longest,
        engine=of_engine(runtime, capacity("cuda")) if ctx.device == "cuda" else 0,
    )


def trained(pairing: Pairing) -> tuple[int, int, int]:
    """Bytes of the student's parameters, of its gradients, and of what the optimizer keeps."""
    config, runtime, student = pairing.ctx.config, pairing.ctx.runtime, pairing.student
    lora = getattr(config, "lora", None)
    if lora is not None and lora.rank:
        from opdctl.models.lora import adapter_parameters

        added = student.trained if student.adapter else adapter_parameters(student, lora)
        own = student.parameters - (added if student.adapter else 0)
        return of_student(own, runtime.dtype, adapter=added)
    masters = hasattr(config, "optim") and runtime.masters_of(config.optim.lr)
    return of_student(student.parameters, runtime.dtype, masters=masters)


def adapter_bytes(folder: str) -> int:
    """Bytes of an adapter in float32."""
    from safetensors import safe_open

    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        return sum(4 * math.prod(file.get_slice(n).get_shape()) for n in list(file.keys()))


def per_token(config) -> int:
    """Numbers that a cache keeps of one token, in all layers."""
    return config.num_hidden_layers * kept_of(config.to_dict())


def capacity(device: str) -> int:
    """Bytes of the GPU, or of the machine as far as this process may use it."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[1]
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(machine, int(text)) if text.isdigit() else machine
