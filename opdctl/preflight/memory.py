"""What the stage will hold at once, against the device or the machine.

Assumed: AdamW with two moments in the parameters' type; every teacher loaded, or as many as
``runtime.resident_teachers`` says, the largest ones; full attention in every layer; a wave of
responses as long as they may get, after the longest of the prompts looked at; and that sampling and
updates take turns. Not counted: activations, a reward model, the teachers' kept hidden rows, other
stages at the same time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

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
    size = student.parameters * each
    places = {pairing.ctx.path_of(r): pairing.outline(n) for n, r in pairing.teachers.items()}
    if pairing.policy:
        places[pairing.ctx.path_of(config.student)] = student
    sizes = sorted((m.parameters * each for m in places.values()), reverse=True)
    prompts = [p for d in pairing.route for p in pairing.prompts(d, PROMPTS)]
    longest = max(len(student.render(p)) for p in prompts) + config.sampling.max_tokens
    wave = min(runtime.wave, config.prompts.per_step * config.prompts.samples)
    chunk = runtime.chunk_mib or (3072 if pairing.ctx.device == "cuda" else 256)
    return Estimate(
        parameters=size,
        gradients=size,
        moments=2 * size if hasattr(config, "optim") else 0,
        teachers=sum(sizes[: runtime.resident_teachers or None]),
        chunk=chunk << 20,
        cache=wave * longest * per_token(student.net.config.get_text_config()) * each,
    )


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
