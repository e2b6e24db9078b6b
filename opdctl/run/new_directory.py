"""The making of a run directory: by one process, and whole or not at all.

It is written beside its place under a name of its own, and renamed when it is complete. Whoever is
first to rename has the place; another process that wanted it is refused and leaves nothing.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from opdctl.errors import UsageError
from opdctl.run.rundir import RunDir, held, lock, sync_file

PRIVATE, SHARED = 0o700, 0o777  # the latter less what the umask takes away
PART = ".part"  # ends the name of what is not complete
LOCK = ".lock"  # held while a directory is made, and while it is run
YOUNG = 60.0  # seconds in which a directory may not have been locked yet


@contextlib.contextmanager
def new_directory(path: Path, shared: bool) -> Iterator[RunDir]:
    """Make a run directory: write into the one that this gives, and it is put in its place.

    Args:
        shared: other users of the machine may enter it, as far as the umask lets them.

    Raises:
        UsageError: the place is taken, before or meanwhile, or cannot be written.
    """
    require_free(path)
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PART}")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir(mode=SHARED if shared else PRIVATE)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", "choose another --out") from None
    try:
        with lock(part / LOCK, str(path)):
            yield RunDir(part)
            _put(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def abandoned(path: Path) -> list[Path]:
    """Return what killed processes left beside the place of a run directory."""
    parts = path.parent.glob(f".{glob.escape(path.name)}.*{PART}")
    return [part for part in parts if _is_old(part) and not held(part / LOCK)]


def _is_old(part: Path) -> bool:
    try:
        return part.is_dir() and time.time() - part.stat().st_mtime > YOUNG
    except FileNotFoundError:  # its process has just finished it
        return False


def require_free(path: Path) -> None:
    """Require that nothing is at a place but an empty folder.

    Raises:
        UsageError: something is; says how to continue a run, or to begin another.
    """
    if path.is_dir() and not path.is_symlink():
        if not any(path.iterdir()):
            return
        if (path / "run.json").is_file():
            raise UsageError(
                f"{path} exists",
                f"opdctl resume {path}    continues it\n"
                f"  --from {path} --out OTHER    starts a new run that reuses its finished stages\n"
                "  --out OTHER    starts afresh",
            )
    if os.path.lexists(path):
        raise UsageError(f"{path} exists and is not a run directory", "choose another --out")


def _put(part: Path, path: Path) -> None:
    try:
        part.rename(path)  # the system replaces an empty folder, and no other
        sync_file(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            require_free(path)
        raise UsageError(f"cannot write {path}: {error.strerror}", "choose another --out") from None
