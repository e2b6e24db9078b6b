"""Prompts on disk, read on access: a sequence that needs eight bytes of memory a prompt.

A spool is written once, in the order of the rows, then only read. The prompt at a place never
changes, so a stage takes prompts in the same order as from memory, a function of (seed, epoch,
position), and a resumed stage reads the rows of its step alone. A spool is committed by rename; it
is derived, and may be deleted between runs.
"""

from __future__ import annotations

import json
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opdctl.types import Prompt

if TYPE_CHECKING:
    import numpy as np  # imported late: reading a recipe needs no arrays

PROMPTS, OFFSETS, COUNTS = "prompts.jsonl", "offsets.npy", "counts.json"


def write(folder: Path, prompts: Iterable[Prompt], counts: dict[str, int]) -> None:
    """Write a spool, unless another process is faster.

    Args:
        counts: counts of rows, saved with the spool after the last prompt was taken.
    """
    import numpy as np

    temporary = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    offsets = array("Q", [0])
    with open(temporary / PROMPTS, "wb") as file:
        for prompt in prompts:
            file.write(json.dumps(vars(prompt)).encode() + b"\n")
            offsets.append(file.tell())
        _synced(file)
    with open(temporary / OFFSETS, "wb") as file:
        np.save(file, np.frombuffer(offsets, dtype=np.uint64))
        _synced(file)
    with open(temporary / COUNTS, "wb") as file:
        file.write(json.dumps({**counts, "kept": len(offsets) - 1}).encode())
        _synced(file)
    try:
        temporary.rename(folder)
    except OSError:  # another process wrote the same spool
        if not (folder / COUNTS).is_file():
            raise
        shutil.rmtree(temporary)


def _synced(file) -> None:
    file.flush()
    os.fsync(file.fileno())


class Spool(Sequence[Prompt]):
    """The prompts of a spool, or some of them. Slices are spools too and read nothing."""

    def __init__(self, folder: Path, places: np.ndarray | range | None = None) -> None:
        """Open the prompts of a folder.

        Args:
            places: the numbers of the prompts in the file; None is all.
        """
        import numpy as np

        self.folder = folder
        self.offsets = np.load(folder / OFFSETS, mmap_mode="r")
        self.places = range(len(self.offsets) - 1) if places is None else places
        self.file = open(folder / PROMPTS, "rb")  # noqa: SIM115  as long as the sequence

    @property
    def counts(self) -> dict[str, int]:
        """The counts that were saved when the spool was written."""
        return json.loads((self.folder / COUNTS).read_bytes())

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Spool(self.folder, self.places[index])
        place = int(self.places[index])
        start, stop = int(self.offsets[place]), int(self.offsets[place + 1])
        return _prompt(os.pread(self.file.fileno(), stop - start, start))

    def __iter__(self) -> Iterator[Prompt]:
        return (self[i] for i in range(len(self)))

    def select(self, indices: array) -> Spool:
        """Return the spool of the prompts at some indices of this one."""
        import numpy as np

        return Spool(self.folder, np.asarray(self.places, dtype=np.int64)[np.asarray(indices)])


def _prompt(line: bytes) -> Prompt:
    fields = json.loads(line)
    return Prompt(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
