"""What the stage will hold at once, against the device or the machine.

Assumed: AdamW with two moments in the type of what it moves (float32 for adapters, and for copies
of bfloat16 parameters, which are counted with the moments); every teacher loaded, or as many as
``runtime.resident_teachers`` says, the largest ones, and a base with all of its adapters once; full
attention in every layer; a wave of responses as long as they may get, after the longest of the
prompts looked at; and that sampling and updates take turns. Not counted: activations, a reward
model, the teachers' kept hidden rows, other stages at the same time.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from opdctl import references
from opdctl.preflight._pairing import Finding, Pairing

PROMPTS = 16  # of each domain, for their length


@dataclass
class Estimate:
    """Bytes by what they are for."""

    parameters: int
    gradients: int
    moments: int
    teachers: int
    chunk: int
    cache: int

    @property
    def certain(self) -> int:
        """What no setting of waves and chunks makes smaller."""
        return self.parameters + self.gradients + self.moments + self.teachers

    @property
    def peak(self) -> int:
        """The larger of sampling and an update."""
        held = self.parameters + self.moments + self.teachers
        return held + max(self.cache, self.gradients + self.chunk)


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
        found = estimate(pairing)
        what = (
            f"about {shown(found.peak)} of {shown(there)} on {pairing.ctx.device}: parameters "
            f"{shown(found.parameters)}, gradients {shown(found.gradients)}, moments "
            f"{shown(found.moments)}, teachers {shown(found.teachers)}, logits of a chunk "
            f"{shown(found.chunk)}, cache of a wave {shown(found.cache)}; without activations"
        )
        if found.certain > there:
            do = "a smaller model or a larger device; runtime.dtype=bfloat16 halves all of it"
            if found.teachers > found.parameters:
                do = f"runtime.resident_teachers=1, or {do}"
            return [Finding("error", what, do)]
        if found.peak > 0.9 * there:
            cache = found.cache > found.gradients + found.chunk
            do = "a smaller runtime.wave" if cache else "a smaller runtime.chunk_mib"
            return [Finding("warning", what, f"{do}, or runtime.resident_teachers=1")]
        return [Finding("ok", what)]


def estimate(pairing: Pairing) -> Estimate:
    """See the module for what is assumed."""
    import torch

    config, runtime, student = pairing.ctx.config, pairing.ctx.runtime, pairing.student
    each = getattr(torch, runtime.dtype).itemsize
    size, grown, kept = trained(pairing, each)
    held = {pairing.ctx.path_of(r): pairing.outline(n) for n, r in pairing.teachers.items()}
    if pairing.policy:
        held[pairing.ctx.path_of(config.student)] = student
    places: dict[str, int] = {}
    for path, model in held.items():  # the outline of an adapter is that of its base
        base = references.base_of(path)
        whole = places.get(base or path, model.parameters * each)
        places[base or path] = whole + (adapter_bytes(path) if base else 0)
    sizes = sorted(places.values(), reverse=True)
    prompts = [p for d in pairing.route for p in pairing.prompts(d, PROMPTS)]
    longest = max(len(student.render(p.text)) for p in prompts) + config.sampling.max_tokens
    wave = min(runtime.wave, config.prompts.per_step * config.prompts.samples)
    chunk = runtime.chunk_mib or (3072 if pairing.ctx.device == "cuda" else 256)
    return Estimate(
        parameters=size,
        gradients=grown,
        moments=kept if hasattr(config, "optim") else 0,
        teachers=sum(sizes[: runtime.resident_teachers or None]),
        chunk=chunk << 20,
        cache=wave * longest * per_token(student.net.config.get_text_config()) * each,
    )


def trained(pairing: Pairing, each: int) -> tuple[int, int, int]:
    """Bytes of the student's parameters, of its gradients, and of what the optimizer keeps."""
    config, student = pairing.ctx.config, pairing.student
    lora, whole = getattr(config, "lora", None), student.parameters
    if lora is not None and lora.rank:
        from opdctl.nets.lora import size

        added = student.trained if student.adapter else size(student.net, lora)
        own = whole - (added if student.adapter else 0)
        wide = added * max(each, 4)
        return own * each + wide, wide, 2 * wide
    if hasattr(config, "optim") and pairing.ctx.runtime.masters_of(config.optim.lr):
        return whole * each, whole * 4, 3 * whole * 4
    return whole * each, whole * each, 2 * whole * each


def adapter_bytes(folder: str) -> int:
    """Bytes of an adapter in float32."""
    from safetensors import safe_open

    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        return sum(4 * math.prod(file.get_slice(n).get_shape()) for n in list(file.keys()))


def per_token(config) -> int:
    """Numbers that a cache keeps of one token: keys and values of every layer."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width


def capacity(device: str) -> int:
    """Bytes of the GPU, or of the machine as far as this process may use it."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[1]
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(machine, int(text)) if text.isdigit() else machine


def shown(size: int) -> str:
    """Bytes in GiB, or below one in MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
