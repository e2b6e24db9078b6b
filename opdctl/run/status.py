"""The state of a run, read from its directory: the JSON of ``opdctl status``. Pure."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from opdctl.config.files import open_regular
from opdctl.run.launch import read_recipe
from opdctl.run.plan import Planned, needed, plan
from opdctl.run.rundir import RunDir, held, last_row, last_step


def status(run: RunDir, at_end: bool = False) -> dict[str, Any]:
    """Return the state of one run, or ``{"runs": [...]}`` for a set of seeds.

    Args:
        at_end: the caller holds the lock of the run, and its stages have ended.

    Raises:
        UsageError: not a run directory.
    """
    if run.is_set():
        runs = [status(r, at_end) for r in run.runs()]
        return {
            "run": str(run.path),
            "recipe": run.manifest()["recipe"],
            "runs": runs,
            "state": _worst([r["state"] for r in runs]),
        }
    manifest, recipe = run.manifest(), read_recipe(run)
    stages = {
        planned.name: _stage(run, recipe, planned) for planned in plan(recipe, run, files="none")
    }
    only = [s for s in manifest.get("only") or () if s in stages]
    wanted = needed(recipe, *only) if only else set(stages)
    state = _worst([s["status"] for name, s in stages.items() if name in wanted])
    if not at_end and held(run / ".lock"):
        state = "running"
    return {
        "run": str(run.path),
        "recipe": manifest["recipe"],
        "size": manifest["size"],
        "seed": manifest["seed"],
        "state": state,
        "stages": stages,
    }


def _stage(run: RunDir, recipe, planned: Planned) -> dict:
    name = planned.name
    record = run.record(name)
    state = record.get("status", "pending")
    total = recipe.total(name)
    if state == "running" and not held(run.stage(name) / ".lock"):
        state = "interrupted"  # killed: its lock died with it
    elif planned.action == "rerun":
        state = "stale"
    metrics = run.stage(name) / "metrics.jsonl"
    step = total if state == "done" else last_step(metrics)
    return {
        "kind": recipe.stages[name].kind,
        "status": state,
        "step": step,
        "total": total,
        "attempt": record.get("attempt", 0),
        "seconds": round(record.get("seconds", 0.0) + _of_this_attempt(run, name, record), 2),
        "loop_seconds": round(record.get("loop_seconds", 0.0), 2),
        "fingerprint": record.get("fingerprint", planned.fingerprint),
        "error": record.get("error", ""),
        "warnings": list(dict.fromkeys(Tail(metrics).read())),  # a step may stand there twice
    }


def _of_this_attempt(run: RunDir, name: str, record: dict) -> float:
    """Return the seconds of an attempt that is not in the record yet: so far, or up to the last
    line it logged where it was killed; 0 where the record has them all."""
    began = record.get("began")
    if record.get("status") != "running" or not began:
        return 0.0
    until = time.time()
    if not held(run.stage(name) / ".lock"):
        row = last_row(run.stage(name) / "metrics.jsonl")
        until = row.get("time", 0.0) if row.get("attempt") == record.get("attempt") else 0.0
    return max(0.0, until - began)


def _worst(states: list[str]) -> str:
    for state in ("failed", "running", "interrupted", "stale", "pending"):
        if state in states:
            return {"stale": "interrupted", "pending": "interrupted"}.get(state, state)
    return "done"


class Tail:
    """The warnings of a metrics file: ``warnings``, as of the last time it was read.

    Args:
        new: only what is written from now on.
    """

    def __init__(self, path: Path, new: bool = False) -> None:
        self.path, self.at = path, 0
        self.warnings: list[str] = []
        if new:
            with contextlib.suppress(OSError):
                self.at = path.stat().st_size

    def read(self) -> list[str]:
        """Return what came since the last time: ``step 12: watchdogs.kl math: ...``."""
        try:
            with open_regular(self.path) as file:
                if file.seek(0, 2) < self.at:
                    self.at = 0  # it was begun again
                file.seek(self.at)
                *lines, rest = file.read().split(b"\n")
                self.at = file.tell() - len(rest)
        except OSError:
            return []
        new = []
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                if b'"warnings"' in line:
                    row = json.loads(line)
                    new += [f"step {row['step']}: {text}" for text in row["warnings"]]
        self.warnings += new
        return new


def last_line(path: Path) -> str:
    """Return the last line of a log; empty without one."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, file.seek(0, 2) - 2000))
            return (file.read().decode(errors="replace").splitlines() or [""])[-1]
    except OSError:
        return ""
