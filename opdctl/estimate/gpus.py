"""The table of GPUs: memory, dense matrix throughput, memory bandwidth; from makers' data sheets.

float32 is that of the ordinary cores: torch multiplies float32 in full precision by default, and
opdctl keeps the default. Sparsity is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import did_you_mean
from opdctl.errors import UsageError


@dataclass(frozen=True)
class Gpu:
    """One model of GPU.

    Attributes:
        memory: bytes.
        flops: operations per second by type of parameters; a multiply-add counts as two.
        bandwidth: bytes per second between memory and cores.
    """

    name: str
    memory: float
    flops: dict[str, float]
    bandwidth: float


def _gpu(name: str, gib: float, bfloat16: float, float32: float, float64: float, tb: float):
    tera = {"bfloat16": bfloat16, "float32": float32, "float64": float64}
    return Gpu(name, gib * 2**30, {k: v * 1e12 for k, v in tera.items()}, tb * 1e12)


GPUS = {
    g.name: g
    for g in (
        _gpu("h100", 80, 989, 67, 34, 3.35),  # SXM5
        _gpu("h200", 141, 989, 67, 34, 4.8),  # SXM
        _gpu("a100", 80, 312, 19.5, 9.7, 2.04),  # SXM4, 80 GB
        _gpu("a100-40", 40, 312, 19.5, 9.7, 1.56),
        _gpu("b200", 180, 2250, 75, 37, 7.7),  # one GPU of HGX B200
        _gpu("l40s", 48, 362, 91.6, 1.4, 0.864),
        _gpu("rtx4090", 24, 165, 82.6, 1.3, 1.01),  # bfloat16 summed in float32
    )
}
DEFAULT = "h100"


def gpu(name: str) -> Gpu:
    """Return a GPU by its name.

    Raises:
        UsageError: no GPU of this name is in the table.
    """
    if name.lower() not in GPUS:
        raise UsageError(f"no GPU {name!r}", did_you_mean(name.lower(), GPUS, "known:"))
    return GPUS[name.lower()]
