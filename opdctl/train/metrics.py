"""metrics.jsonl: one line a step, flushed, with ``step`` and ``attempt``; and who watches it.

Readers keep the last attempt of each step (rundir.read_rows). Fields that time, host or memory
determine are named in rundir.VOLATILE. Non-finite values become null and are counted.
"""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from opdctl.config.registry import member
from opdctl.errors import StageFailed
from opdctl.run.rundir import finite

ABOUT = ("step", "attempt", "seconds", "time", "cpu_seconds", "memory_mib")
OF_THE_ROW = (*ABOUT, "warnings", "non_finite")


def joined(*tables: dict[str, Any]) -> dict[str, Any]:
    """Return one table of what different parts of a step log.

    Raises:
        StageFailed: two of them have the same name, or one has that of a row's own entry.
    """
    whole: dict[str, Any] = {}
    for table in tables:
        for name in table:
            if name in whole or name in OF_THE_ROW:
                raise StageFailed(
                    f"two numbers of a step are called {name!r}, and metrics.jsonl has room for "
                    "one",
                    "give what a member of your own logs another name",
                )
        whole |= table
    return whole


class Metrics:
    """The metrics of one stage, appended line by line."""

    def __init__(self, folder: Path, attempt: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = open(folder / "metrics.jsonl", "a+b")  # noqa: SIM115
        self.attempt = attempt
        self.file.seek(0, 2)
        if self.file.tell():
            self.file.seek(-1, 2)
            if self.file.read(1) != b"\n":  # a kill cut the last line short
                self.file.write(b"\n")

    def row(self, step: int, values: dict, seconds: dict[str, float]) -> None:
        """Write one step. ``seconds`` are volatile."""
        bad = sum(isinstance(v, float) and not math.isfinite(v) for v in values.values())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        row = {
            "step": step,
            "attempt": self.attempt,
            **values,
            **({"non_finite": bad} if bad else {}),
            "seconds": {k: round(v, 5) for k, v in seconds.items()},
            "time": round(time.time(), 3),
            "cpu_seconds": round(time.process_time(), 3),  # of this attempt, whatever else runs
            "memory_mib": round(peak, 1),
        }
        self.file.write(json.dumps(finite(row)).encode() + b"\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class Watch:
    """The watchdogs of a stage: they see every step, and say what was wrong for long enough.

    A watchdog acts once it has seen the same thing ``steps`` times in a row; warning, it speaks
    again whenever that number has doubled.

    Attributes:
        state: how often in a row each thing was seen, and the numbers of the first step that had
            tokens. It belongs in the checkpoint: a resumed stage says the same.
    """

    def __init__(self, configs: dict[str, Any], stage: str) -> None:
        self.dogs = {name: member("watchdogs", name)(config) for name, config in configs.items()}
        self.stage = stage
        self.state: dict[str, dict] = {"row": {}, "first": {}}

    def look(self, step: int, values: dict) -> tuple[list[str], StageFailed | None]:
        """Return what to warn of in this step, and the failure if the stage is to stop."""
        if not self.state["first"] and values["tokens"]:
            self.state["first"] = {k: v for k, v in values.items() if isinstance(v, int | float)}
        before, self.state["row"] = self.state["row"], {}
        warnings, stop = [], None
        for name, dog in self.dogs.items():
            config = dog.config
            for subject, text in dog.look(values, self.state["first"]).items():
                place = f"{name} {subject}".strip()
                row = self.state["row"][place] = before.get(place, 0) + 1
                steps = "" if row == 1 else f", {row} steps in a row"
                said = f"watchdogs.{place}: {text}{steps}"
                last = config.action == "stop" and row >= config.steps
                start = 1 if dog.at_once else config.steps
                if last or (row % start == 0 and (row // start).bit_count() == 1):
                    warnings.append(said)
                    print(f"{self.stage}: step {step}: warning: {said}", flush=True)
                if last and stop is None:
                    key = f"stages.{self.stage}.watchdogs.{name}.action=warn"
                    stop = StageFailed(f"step {step}: {said}", f"{dog.hint}; {key} goes on")
        return warnings, stop


def mean(values) -> float:
    """Return the mean of a sequence; 0 of none."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def means(table: dict[str, Tensor], kept_N: Tensor | None) -> dict[str, float]:
    """Return the mean of each per-token number, [N]; tokens that no objective learns from are
    stored as 0 and excluded. ``masked``, which counts those, is over all.

    Args:
        kept_N: which are meant, boolean; None is all. Where none is only ``masked`` is there.
    """
    averages = {}
    for name, value_N in table.items():
        if kept_N is not None and name != "masked":
            value_N = value_N[kept_N]
        if len(value_N):
            averages[name] = float(value_N.mean())
    return averages


def by_domain(rollouts, values) -> dict[str, float]:
    """Return the mean value of each domain's rollouts, sorted by name; ``values`` has one a
    rollout."""
    groups: dict[str, list[float]] = {}
    for rollout, value in zip(rollouts, values, strict=True):
        groups.setdefault(rollout.prompt.domain, []).append(value)
    return {d: mean(v) for d, v in sorted(groups.items())}
