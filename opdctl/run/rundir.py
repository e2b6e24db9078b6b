"""The run directory: layout, locks, atomic writes, stage records. Only this module writes them.

A stage is done only when its ``stage.json`` says so; that file is written last and atomically, so
a folder that exists means nothing. Locks are OS locks: they die with their holder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opdctl.config.files import open_regular, read_text
from opdctl.errors import BusyError, UsageError

VOLATILE = ("seconds", "time", "cpu_seconds", "attempt", "host", "memory_mib", "teacher_loads")


class RunDir:
    """One run directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def stage(self, name: str) -> Path:
        return self.path / "stages" / name

    def output(self, name: str) -> Path:
        return self.stage(name) / "output"

    def record(self, name: str) -> dict:
        """Return the stage's record; empty before its first attempt."""
        return read_json(self.stage(name) / "stage.json") or {}

    def manifest(self) -> dict:
        """Return ``run.json``.

        Raises:
            UsageError: this is not a run directory.
        """
        manifest = read_json(self / "run.json")
        if manifest is None or "recipe" not in manifest:
            raise UsageError(
                f"{self.path} is not a run directory (no readable run.json)",
                "`opdctl ls runs` lists them" if self.path.is_dir() else "no such folder",
            )
        return manifest

    def is_set(self) -> bool:
        """Return whether it holds one run per seed."""
        return isinstance(self.manifest().get("seeds"), list)

    def runs(self) -> list[RunDir]:
        """Return the runs in it: itself, or one per seed."""
        seeds = self.manifest().get("seeds")
        return [RunDir(self / f"seed-{s}") for s in seeds] if seeds else [self]


def new_name(recipe: str) -> str:
    """Return a name that no other run has: ``mimo-20261120-101500-3f2a``."""
    return f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def clear_stage(folder: Path) -> None:
    """Remove what a stage made, its record last; its configuration and its lock stay."""
    names = [
        "output",
        "checkpoints",
        "parts",
        "wal",
        "rollouts",
        "results.json",
        "facts.json",
        "example.json",
        "metrics.jsonl",
    ]
    for path in (folder / name for name in [*names, "stage.json"]):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def drop_checkpoints(folder: Path) -> None:
    """Remove a stage's checkpoints and log, once its record says that it is done."""
    for name in ("checkpoints", "wal"):
        shutil.rmtree(folder / name, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Force a file, or the entries of a folder, to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; their names are on the disk when this returns."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_file(folder.parent)


def commit_folder(part: Path, place: Path) -> None:
    """Rename a finished folder into place and make that durable; an old one there is replaced."""
    sync_file(part)
    if place.exists():
        old = place.with_name(f".{place.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
        part.rename(place)
        shutil.rmtree(old)
    else:
        part.rename(place)
    sync_file(place.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, durably."""
    make_folder(path.parent)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_file(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all, durably. Non-finite numbers become null."""
    write_text(path, json.dumps(finite(content), indent=1) + "\n")


def finite(content: Any) -> Any:
    """Return the same content with null for every number JSON cannot say."""
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, dict):
        return {k: finite(v) for k, v in content.items()}
    if isinstance(content, list | tuple):
        return [finite(v) for v in content]
    return content


def read_json(path: Path, kind: type = dict) -> Any:
    """Return the content; None where there is no readable JSON of that kind."""
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, kind) else None


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a metrics file, of each step the last, in the order of steps.

    A line that a kill cut short is left out: its step was repeated.
    """
    rows: dict[Any, dict] = {}
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def last_row(path: Path) -> dict:
    """Return the last whole line of a metrics file, read from its end; empty without one."""
    try:
        with open_regular(path) as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 16384))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            return row
    return {}


def last_step(path: Path) -> int:
    """Return the step of the last row; 0 without one."""
    step = last_row(path).get("step", 0)
    return step if isinstance(step, int) else 0


@contextlib.contextmanager
def lock(path: Path, name: str, wait: float = 2.0) -> Iterator[None]:
    """Hold an OS lock on ``path``; ``name`` is its name in an error.

    Raises:
        BusyError: another process holds it after ``wait`` seconds; says which.
        UsageError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
    try:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    holder = os.pread(fd, 200, 0).decode(errors="replace").strip()
                    raise BusyError(
                        f"{name} is in use by {holder or 'another process'}",
                        "wait for it, or stop that process",
                    ) from None
                time.sleep(0.05)
        os.ftruncate(fd, 0)
        start = time.strftime("%Y-%m-%d %H:%M:%S")
        os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()} since {start}".encode(), 0)
        yield
    finally:
        os.close(fd)


def held(path: Path) -> bool:
    """Return whether another process holds the lock."""
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(fd)
