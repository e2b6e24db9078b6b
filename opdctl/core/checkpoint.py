"""Training state on disk: weights, optimizer, ledger; committed by a rename, no pickle.

A checkpoint is a folder ``step-000040``. It is written beside its place, every file and the folder
synced, then renamed: one that has its name is whole. The newest few are kept.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from opdctl.core import models
from opdctl.core.models import Model
from opdctl.rundir import commit_folder, make_folder, sync_file


def save(
    folder: Path, step: int, model: Model, optimizer: torch.optim.AdamW, state: dict, keep: int
) -> None:
    """Commit ``step-N`` under ``folder`` and drop all but the newest ``keep``.

    Args:
        step: optimizer steps done.
        state: small JSON values to have back (the ledger, counters).
    """
    part = folder / f".step-{step:06d}.part"
    shutil.rmtree(part, ignore_errors=True)
    make_folder(part)
    names = model.moved()  # of an adapter's base, or of bfloat16 copies, nothing is kept
    save_file(
        {n: p.detach().cpu().contiguous() for n, p in names.items()}, part / "weights.safetensors"
    )
    moments = {}
    for name, parameter in names.items():
        for slot, value in optimizer.state.get(parameter, {}).items():
            moments[f"{name}|{slot}"] = torch.as_tensor(value).detach().cpu().contiguous()
    save_file(moments, part / "optimizer.safetensors")
    (part / "state.json").write_text(json.dumps({"step": step, **state}))
    for path in part.iterdir():
        sync_file(path)
    commit_folder(part, folder / f"step-{step:06d}")
    for old in committed(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old:06d}", ignore_errors=True)


def committed(folder: Path) -> list[int]:
    """Steps of the committed checkpoints, ascending. Sweeps nothing, loads nothing."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name[5:]) for p in folder.glob("step-*") if p.is_dir())


def restore(folder: Path, model: Model, optimizer: torch.optim.AdamW) -> dict | None:
    """Load the newest readable checkpoint into model and optimizer; None without one.

    A checkpoint that cannot be read is named on stderr and the one before it is taken.
    """
    names = model.moved()
    for step in reversed(committed(folder)):
        part = folder / f"step-{step:06d}"
        try:
            weights = load_file(part / "weights.safetensors")
            moments = load_file(part / "optimizer.safetensors")
            state = json.loads((part / "state.json").read_text())
            _require_ours(names, weights, moments, state)
        except (OSError, ValueError, SafetensorError) as error:
            print(f"{part} cannot be read ({error}); taking the one before it", flush=True)
            continue
        with torch.no_grad():
            for name, parameter in names.items():
                parameter.copy_(weights[name])
        if model.masters is not None:
            model.masters.publish()
        for flat, value in moments.items():
            name, slot = flat.rsplit("|", 1)
            device = "cpu" if slot == "step" else model.device
            optimizer.state[names[name]][slot] = value.to(device)
        return state
    return None


def _require_ours(names: dict, weights: dict, moments: dict, state: Any) -> None:
    """Raises ValueError where a checkpoint is not one of this model."""
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise ValueError("its state.json has no step")
    shapes = {name: parameter.shape for name, parameter in names.items()}
    if {name: weight.shape for name, weight in weights.items()} != shapes:
        raise ValueError("its weights are of another model")
    if not {flat.rpartition("|")[0] for flat in moments} <= names.keys():
        raise ValueError("its moments are of another model")


def store(path: Path, tensors: dict) -> None:
    """Put tensors aside, to be read again; lost with the process that wrote them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, path)


def stored(path: Path) -> dict:
    """What ``store`` put there."""
    return load_file(path)


def commit(folder: Path, model: Model) -> None:
    """Write a stage's ``output/``: it appears only when it is complete."""
    part = folder / ".output.part"
    shutil.rmtree(part, ignore_errors=True)
    models.save(model, part)
    commit_folder(part, folder / "output")
