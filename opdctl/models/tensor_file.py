"""Named tensors in a safetensors file."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file


def write(path: Path, tensors: dict) -> None:
    """Write tensors by name. A caller who needs them after a power loss syncs the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, path)


def read(path: Path) -> dict:
    """Return the tensors that ``write`` put there, by name."""
    return load_file(path)
