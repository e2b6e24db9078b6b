"""Write-ahead log of the steps since the last checkpoint: tokens as they are drawn, and scores.

A kill loses the weights back to the newest checkpoint, and nothing that was sampled or asked of a
teacher since: the steps are taken again on the logged answers. Of a wave that was cut, the logged
tokens are forced in the same slots and shapes and the next ones are drawn, so the bits are those of
a run that was never cut, and short answers are not favoured over long ones (DeepSeek-V4, arXiv
2606.19348: regenerating what was interrupted favours them).

An entry is kept under a digest of what was asked, so it answers only the very same question. The
log survives the death of its process; that of the machine loses it, and then the steps since the
checkpoint are sampled again. Left out: hidden rows of teachers, which would be most of the bytes,
and the cache of a cut wave, whose forward passes are taken again.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

HEAD = struct.Struct("<III")  # bytes of the name, bytes of the arrays, checksum of both


class Wal:
    """The log of one stage: a file for each step, an entry for each answer.

    Attributes:
        kept: entries that answered a question again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.kept = folder, 0
        self._step: int | None = None
        self._file = None
        self._found: dict[str, list[dict[str, np.ndarray]]] = {}

    def at(self, step: int) -> None:
        """Log under this step from now on; what an earlier attempt logged there can be had. Numbers
        below 0 are of what comes before the first step."""
        if step == self._step:
            return
        self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self.folder / f"step-{step:06d}", "a+b", buffering=0)  # noqa: SIM115
        self._step, self._found = step, {}
        whole = 0
        self._file.seek(0)
        for name, arrays, end in entries(self._file.read()):
            self._found.setdefault(name, []).append(arrays)
            whole = end
        self._file.truncate(whole)  # a kill may have cut the last entry short

    def get(self, name: str) -> list[dict[str, np.ndarray]]:
        """Return what an earlier attempt put under a name, in its order; empty if nothing."""
        logged = self._found.pop(name, [])
        self.kept += len(logged)
        return logged

    def put(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Append an entry. It is with the operating system when this returns."""
        assert self._file is not None, "an entry belongs to a step"
        label, payload = name.encode(), save(arrays)
        head = HEAD.pack(len(label), len(payload), zlib.crc32(label + payload))
        self._file.write(head + label + payload)

    def drop(self, before: int) -> None:
        """Remove the steps before one: a checkpoint covers them."""
        for path in self.folder.glob("step-*"):
            if int(path.name[5:]) < before:
                path.unlink()

    def holds(self, prefix: str) -> bool:
        """Return True if any step's log has an entry whose name begins so."""
        return any(
            name.startswith(prefix)
            for path in sorted(self.folder.glob("step-*"))
            for name, _, _ in entries(path.read_bytes())
        )

    def close(self) -> None:
        """Close the file of the step."""
        if self._file is not None:
            self._file.close()
        self._step, self._file, self._found = None, None, {}


def entries(content: bytes):
    """Yield (name, arrays, where it ends) of each whole entry, up to the first that is not."""
    at = 0
    while at + HEAD.size <= len(content):
        label, payload, checksum = HEAD.unpack_from(content, at)
        start, at = at + HEAD.size, at + HEAD.size + label + payload
        body = content[start:at]
        if at > len(content) or zlib.crc32(body) != checksum:
            return
        yield body[:label].decode(), load(body[label:]), at
