"""The files that a path names: one, or those that a pattern fits, in the order of their names.

The order is that of the text of the paths, so ``train-10`` comes before ``train-2``: shards are
numbered with zeros in front (``train-00002-of-00010``), as everybody writes them.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path

WILD = "*?["


def shards(path: str) -> list[Path]:
    """The files; none where the path names none. A file of that very name is no pattern."""
    if os.path.isfile(path):
        return [Path(path)]
    if not any(mark in path for mark in WILD):
        return []
    return [Path(p) for p in sorted(glob.glob(path, recursive=True)) if os.path.isfile(p)]
