"""The files of a run directory that no record needs: they are left where a kill fell badly.

A stage that is done needs no checkpoint and no log of its steps. What ends in ``.part`` or ``.old``
was being written or replaced. The holder of the run's lock may remove all of it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from opdctl.run.new_directory import abandoned
from opdctl.run.rundir import RunDir

UNFINISHED = (".*.part", ".*.old")


def leftovers(run: RunDir) -> list[Path]:
    """Return the files and folders of a run directory that no record needs."""
    places = [run.path, run / "stages"]
    paths = list((run / "logs").glob(".latest.*"))
    for folder in sorted((run / "stages").glob("*")):
        places += [folder, folder / "checkpoints"]
        if run.record(folder.name).get("status") == "done":
            places.remove(folder / "checkpoints")
            paths += [folder / name for name in ("checkpoints", "wal") if (folder / name).is_dir()]
    for place in places:
        paths += [path for pattern in UNFINISHED for path in sorted(place.glob(pattern))]
    return paths + abandoned(run.path)


def tidy(run: RunDir) -> int:
    """Remove what no record needs. Return the bytes that this freed.

    The caller holds the run's lock.
    """
    freed = 0
    for path in leftovers(run):
        freed += size(path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return freed


def size(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(file.lstat().st_size for file in files if not file.is_dir())
