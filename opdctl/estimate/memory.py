"""Estimate the bytes that a stage holds at once, for ``plan`` and for the check before a start.

Assumed: AdamW with two moments in the parameters' type, or in float32 for copies of bfloat16
parameters (counted with the moments) and for adapters; gradients in at least float32, in which
micro-batches are summed; frozen models, all loaded or the
largest ``runtime.resident_teachers`` of them; full attention in every layer; a wave of responses of
the largest allowed length; sampling and updates in turns. Not counted: hidden rows kept for
teachers, fragmentation, other stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
CHUNK_MIB = {"cuda": 3072, "cpu": 256}  # where runtime.chunk_mib is 0
SHARE = 0.3  # of the GPU that vllm takes while it samples, where its arguments do not say


@dataclass
class Estimate:
    """The bytes of a stage by purpose."""

    parameters: int
    gradients: int
    moments: int
    teachers: int
    chunk: int
    cache: float
    activations: int = 0

    @property
    def certain(self) -> int:
        """The bytes that no setting of waves and chunks makes smaller."""
        return self.parameters + self.gradients + self.moments + self.teachers

    @property
    def peak(self) -> float:
        """The bytes of sampling or of an update, the larger."""
        held = self.parameters + self.moments + self.teachers
        return held + max(self.cache, self.gradients + self.chunk + self.activations)


def student_bytes(
    parameters: float, dtype: str, *, masters: bool = False, adapter: float | None = None
) -> tuple[int, int, int]:
    """Return the bytes of a student's parameters, of its gradients and of the optimizer's state.

    Args:
        parameters: how many it has, without the adapter.
        masters: the optimizer updates float32 copies.
        adapter: parameters of an adapter beside it, which alone is trained; None without one.
    """
    each = BYTES[dtype]
    size = int(parameters * each)
    if adapter is not None:
        wide = int(adapter * max(each, 4))
        return size + wide, wide, 2 * wide
    if masters:
        return size, int(4 * parameters), int(12 * parameters)
    return size, int(parameters * max(each, 4)), 2 * size


def engine_bytes(runtime: Any, memory: float) -> float:
    """Return the bytes that the sampling engine reserves on the stage's GPU, caches included.

    Only vllm reserves any: the cache of transformers is that of a wave and is counted there, and a
    server has a device of its own.

    Args:
        memory: bytes of the GPU.
    """
    if runtime.engine != "vllm":
        return 0.0
    return memory * runtime.engine_args.get("gpu_memory_utilization", SHARE)


def estimate(
    student: tuple[int, int, int],
    frozen: list[float],
    *,
    dtype: str,
    learns: bool,
    steps: bool,
    resident: int = 0,
    chunk_mib: int = 0,
    device: str = "cuda",
    cached: int = 0,
    sampled: float = 0,
    engine: float = 0,
    activated: int = 0,
    trained: int = 0,
) -> Estimate:
    """Return the estimate of a stage; the module says what is assumed.

    Args:
        student: bytes, see ``student_bytes``.
        frozen: bytes of each other model.
        learns: the stage computes gradients.
        steps: the stage takes steps of an optimizer.
        resident: most frozen models loaded at once; 0 is all.
        cached: numbers a cache keeps of a token.
        sampled: tokens in the caches of a wave, at most.
        engine: bytes of an engine that has memory of its own while it samples, caches included.
        activated: numbers a training pass keeps of a token.
        trained: tokens of a micro-batch.
    """
    each = BYTES[dtype]
    size, grown, kept = student
    largest = sorted(frozen, reverse=True)[: resident or None]
    return Estimate(
        parameters=size,
        gradients=grown if learns else 0,
        moments=kept if steps else 0,
        teachers=int(sum(largest)),
        chunk=(chunk_mib or CHUNK_MIB[device]) << 20 if learns else 0,
        cache=int(engine) or sampled * cached * each,
        activations=trained * activated * each if learns else 0,
    )


def format_bytes(size: float) -> str:
    """Format bytes in GiB, below one GiB in MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
