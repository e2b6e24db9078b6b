"""Compare the weights of two models on disk, one tensor at a time; no model is loaded.

An adapter is compared by the weights it makes of its base, W + (alpha / rank) B A, not by its two
factors: many other pairs of factors have the same product.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opdctl.config import references
from opdctl.errors import UsageError


def folder_of(place: str) -> Path:
    """Return the folder with a model's weights; those of a public name are fetched.

    Raises:
        UsageError: a public name cannot be fetched.
    """
    if Path(place).is_dir():
        return Path(place)
    from huggingface_hub import snapshot_download

    name, _, revision = place.partition("@")
    try:
        folder = snapshot_download(
            name, revision=revision or None, allow_patterns="model*.safetensors"
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load {place}: {str(error).strip().splitlines()[0]}") from error
    return Path(folder)


def same_weights(ours: str | Path, theirs: str | Path) -> bool:
    """Return True where two models have the same weights, whatever their files and types.

    Reading stops at the first tensor that differs. An adapter that is more than pairs of A and B
    cannot be compared, and is taken to be another model.
    """
    import torch

    from opdctl.models.lora import Incomparable

    try:
        a, b = StoredWeights(str(ours)), StoredWeights(str(theirs))
    except Incomparable:
        return str(ours) == str(theirs)
    if a.files.keys() != b.files.keys():
        return False
    changed = a.deltas.keys() | b.deltas.keys()
    if not changed <= a.files.keys():
        return False  # of something that is no tensor of the base: it cannot be told
    for name in sorted(changed if a.place == b.place else a.files):
        x, y = a.read(name), b.read(name)
        wide = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(wide), y.to(wide)
        alike = torch.allclose(x, y, rtol=1e-5, atol=1e-7) if changed else torch.equal(x, y)
        if not alike:
            return False
    return True


class StoredWeights:
    """The tensors of a model, an adapter's product added to its base's.

    Attributes:
        place: the folder or public name of the model; for an adapter that of its base.
        files: the file of each tensor.
        deltas: functions that compute what an adapter adds to a tensor.
    """

    def __init__(self, reference: str) -> None:
        from safetensors import safe_open

        base = references.base_of(reference)
        self.place = base or reference
        self.files: dict[str, Path] = {}
        for path in sorted(folder_of(self.place).glob("model*.safetensors")):
            with safe_open(path, "pt") as file:
                self.files |= dict.fromkeys(file.keys(), path)
        self.deltas: dict[str, Any] = {}
        if base:
            from opdctl.models.lora import weight_deltas

            self.deltas = weight_deltas(reference)

    def read(self, name: str) -> Any:
        """Return a tensor as the model has it, an adapter's change added."""
        from safetensors import safe_open

        with safe_open(self.files[name], "pt") as file:
            tensor = file.get_tensor(name)
        if name not in self.deltas:
            return tensor
        delta = self.deltas[name]()
        return tensor + (delta if delta.shape == tensor.shape else delta.T).to(tensor.dtype)
