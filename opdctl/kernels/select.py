"""The level of the row pass: chosen automatically, logged with every stage, can be forced.

opdctl run RECIPE runtime.kernel=reference
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from opdctl.errors import UsageError


def rows_class(kernel: str, device: torch.device, dtype: torch.dtype = torch.float32) -> type:
    """The class of a level: reference, chunked, triton; auto is triton on CUDA, else chunked.

    Args:
        dtype: of the logits; Triton's level has fp32 alone.

    Raises:
        UsageError: triton asked for where it cannot run.
    """
    able = find_spec("triton") is not None and dtype == torch.float32
    able = able and (device.type == "cuda" or _interpreted())
    if kernel == "triton" and not able:
        raise UsageError(
            f"runtime.kernel is triton, which cannot run here: {device.type}, {dtype} logits",
            "runtime.kernel=auto",
        )
    if kernel == "triton" or (kernel == "auto" and able and device.type == "cuda"):
        from opdctl.kernels.triton_rows import Rows
    elif kernel == "reference":
        from opdctl.kernels.reference import Rows
    else:
        from opdctl.kernels.chunked import Rows
    return Rows


def _interpreted() -> bool:
    """Return True under Triton's interpreter, which runs the source on a CPU: for tests, slow."""
    from triton import knobs

    return bool(knobs.runtime.interpret)
