"""State of a stage on disk: weights, optimizer, ledger; committed by a rename, no pickle.

A checkpoint is a folder ``step-000040``. It is written beside its place, every file and the folder
synced, then renamed: one that has its name is whole. The newest few are kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from opdctl.models import tensor_file
from opdctl.models.export import export
from opdctl.models.model import Model
from opdctl.run.rundir import commit_folder, make_folder, sync_file


def save(
    folder: Path,
    step: int,
    model: Model,
    optimizer: torch.optim.AdamW,
    state: dict,
    keep: int,
    members: dict[str, dict] | None = None,
) -> None:
    """Commit ``step-N`` under ``folder`` and drop all but the newest ``keep``.

    Args:
        step: optimizer steps done.
        state: small JSON values to have back (the ledger, counters).
        members: what each member remembers, by its name: JSON values and tensors.
    """
    members = members or {}
    held = {
        f"{name}|{key}": value
        for name, kept in members.items()
        for key, value in kept.items()
        if isinstance(value, torch.Tensor)
    }
    state |= {
        "members": {
            name: {key: value for key, value in kept.items() if f"{name}|{key}" not in held}
            for name, kept in members.items()
        },
        "held": len(held),
    }
    names = (
        model.trainable_parameters()
    )  # of an adapter's base, or of bfloat16 copies, nothing is kept
    moments = {}
    for name, parameter in names.items():
        for slot, value in optimizer.state.get(parameter, {}).items():
            moments[f"{name}|{slot}"] = torch.as_tensor(value)
    files = {"weights": names, "optimizer": moments} | ({"members": held} if held else {})
    write(folder, step, files, state, keep)


def write(
    folder: Path, step: int, files: dict[str, dict[str, torch.Tensor]], state: dict, keep: int
) -> None:
    """Commit tensors, by file and name, and small JSON values as ``step-N``; as ``save`` does."""
    part = folder / f".step-{step:06d}.part"
    shutil.rmtree(part, ignore_errors=True)
    make_folder(part)
    for file, tensors in files.items():
        tensor_file.write(part / f"{file}.safetensors", tensors)
    (part / "state.json").write_text(json.dumps({"step": step, **state}))
    for path in part.iterdir():
        sync_file(path)
    commit_folder(part, folder / f"step-{step:06d}")
    for old in committed(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old:06d}", ignore_errors=True)


def committed(folder: Path) -> list[int]:
    """Return the steps of the committed checkpoints, ascending. Sweeps nothing, loads nothing."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name[5:]) for p in folder.glob("step-*") if p.is_dir())


def restore(folder: Path, model: Model, optimizer: torch.optim.AdamW) -> dict | None:
    """Load the newest readable checkpoint into model and optimizer; None without one.

    A checkpoint that cannot be read is named on stderr and the one before it is taken.
    """
    names = model.trainable_parameters()
    saved = read(folder, ("weights", "optimizer"), partial(_require_ours, names))
    if saved is None:
        return None
    (weights, moments), state = saved
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


def read(
    folder: Path, files: tuple[str, ...], check: Callable[..., None]
) -> tuple[list[dict[str, torch.Tensor]], dict] | None:
    """The tensors of each file and the JSON values of the newest checkpoint that can be read.

    Args:
        check: given the tensors of each file; raises ValueError where they are not the stage's.
    """
    for step in reversed(committed(folder)):
        part = folder / f"step-{step:06d}"
        try:
            tensors = [load_file(part / f"{file}.safetensors") for file in files]
            state = json.loads((part / "state.json").read_text())
            if not isinstance(state, dict) or not isinstance(state.get("step"), int):
                raise ValueError("its state.json has no step")
            check(*tensors)
            if state.get("held"):
                _give_back(state, load_file(part / "members.safetensors"))
        except (OSError, ValueError, SafetensorError) as error:
            print(f"{part} cannot be read ({error}); taking the one before it", flush=True)
            continue
        return tensors, state
    return None


def _give_back(state: dict, held: dict[str, torch.Tensor]) -> None:
    """Put the tensors that members remember among their JSON values.

    Raises:
        ValueError: they are not all there.
    """
    if len(held) != state["held"]:
        raise ValueError("what its members remember is not all there")
    for flat, value in held.items():
        name, key = flat.split("|", 1)
        state["members"][name][key] = value


def _require_ours(names: dict, weights: dict, moments: dict) -> None:
    """Raise ValueError where a checkpoint is not one of this model."""
    shapes = {name: parameter.shape for name, parameter in names.items()}
    if {name: weight.shape for name, weight in weights.items()} != shapes:
        raise ValueError("its weights are of another model")
    if not {flat.rpartition("|")[0] for flat in moments} <= names.keys():
        raise ValueError("its moments are of another model")


def commit(folder: Path, model: Model) -> None:
    """Write a stage's ``output/``: it appears only when it is complete, and says what was trained.

    The model is not to be used afterwards.

    Raises:
        StageFailed: what was written is not the model.
    """
    part = folder / ".output.part"
    shutil.rmtree(part, ignore_errors=True)
    gap = export(model, part)
    print(f"{folder.name}: log-probs of output/ are the model's to {gap:.1g} nats", flush=True)
    commit_folder(part, folder / "output")
