"""metrics.jsonl: one line a step, flushed, with ``step`` and ``attempt``.

Readers keep the last attempt of each step (rundir.read_rows). Fields that time, host or memory
determine are named in rundir.VOLATILE. Non-finite values become null and are counted.
"""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path

from opdctl.rundir import finite


class Metrics:
    """Appends to the metrics of one stage."""

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
            "memory_mib": round(peak, 1),
        }
        self.file.write(json.dumps(finite(row)).encode() + b"\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def mean(values) -> float:
    """Mean of a sequence; 0 of none."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def by_domain(rollouts, values) -> dict[str, float]:
    """Mean value of the rollouts of each domain, sorted by name. ``values`` has one a rollout."""
    groups: dict[str, list[float]] = {}
    for rollout, value in zip(rollouts, values, strict=True):
        groups.setdefault(rollout.prompt.domain, []).append(value)
    return {d: mean(v) for d, v in sorted(groups.items())}
