"""What runs measured, as claims read it: scores per prompt, facts of a stage, learning curves.

Scores come from the evaluations at temperature 1 and are kept per prompt, so that a bootstrap over
prompts can draw the same prompts for every model. Facts come from the stages' records (the ledger)
and their results; curves from metrics.jsonl.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opdctl import draws
from opdctl.errors import UsageError
from opdctl.run.launch import read_recipe
from opdctl.run.rundir import RunDir, read_json, read_rows

RESAMPLES = 1000


class Scores(dict):
    """Mean scores, or those of all resamples, of one run.

    ``scores[model, domain]`` is accuracy; ``scores[model, domain, what]`` is ``tokens`` a response,
    ``obedience`` to the mode, or ``pass@K``. ``fact`` and ``curve`` are the same for all resamples.
    """

    measured: Measured

    def fact(self, stage: str, name: str) -> Any:
        """A number of a stage: see ``facts``.

        Raises:
            KeyError: it was not measured.
        """
        found = self.measured.facts.get((stage, name))
        if found is None:
            raise KeyError((stage, name))
        return found

    def curve(self, stage: str, name: str) -> list[dict]:
        """A key of the stage's metrics, step by step.

        Raises:
            KeyError: it was not measured.
        """
        rows = [row[name] for row in self.measured.rows.get(stage, []) if name in row]
        if not rows:
            raise KeyError((stage, name))
        return rows


@dataclass
class Measured:
    """What one run measured.

    Attributes:
        values: per prompt, by (model, domain) or (model, domain, what).
        facts: numbers by (stage, name).
        rows: the metrics of each stage.
    """

    values: dict[tuple, np.ndarray] = field(default_factory=dict)
    facts: dict[tuple[str, str], float] = field(default_factory=dict)
    rows: dict[str, list[dict]] = field(default_factory=dict)

    def scores(self) -> Scores:
        """Means over prompts."""
        found = Scores((k, np.mean(v)) for k, v in self.values.items())
        found.measured = self
        return found

    def resampled(self, seed: int = 0) -> Scores:
        """The same on resampled prompts, [RESAMPLES] each; one resample for all models."""
        found = _Resampled()
        found.measured, found.seed, found.drawn = self, seed, {}
        return found


class _Resampled(Scores):
    """Scores of the resamples, computed when asked for.

    Where all of the prompts were failed, or none, every resample would say the same: their shares
    are drawn from Beta(right + 1/2, wrong + 1/2) (Jeffreys), so that 0 of 20 is no certainty.
    """

    seed: int
    drawn: dict[tuple[str, int], np.ndarray]

    def __missing__(self, key: tuple) -> np.ndarray:
        value, domain = self.measured.values[key], key[1]
        share = len(key) == 2 or key[2].startswith("pass@")
        if share and value.std() == 0.0 and value[0] in (0.0, 1.0):
            rng = np.random.default_rng(draws.key(self.seed, key))
            ends = len(value) * value[0] + 0.5, len(value) * (1 - value[0]) + 0.5
            self[key] = rng.beta(*ends, RESAMPLES)
            return self[key]
        shape = domain, len(value)
        if shape not in self.drawn:
            rng = np.random.default_rng(draws.key(self.seed, domain))
            self.drawn[shape] = rng.integers(0, len(value), (RESAMPLES, len(value)))
        self[key] = value[self.drawn[shape]].mean(axis=1)
        return self[key]


def measured(run: RunDir) -> Measured:
    """What the finished stages of a run found; of evaluations those at temperature 1.

    Raises:
        UsageError: a file of results is damaged.
    """
    found, recipe = Measured(), read_recipe(run)
    for name, stage in recipe.stages.items():
        record = run.record(name)
        if record.get("status") != "done":
            continue
        folder = run.stage(name)
        of_stage = facts(record) | (read_json(folder / "facts.json") or {})
        found.facts |= {(name, k): v for k, v in of_stage.items()}
        found.rows[name] = read_rows(folder / "metrics.jsonl")
        if not hasattr(stage, "sampling") or stage.sampling.temperature != 1.0:
            continue
        try:
            for row in read_json(folder / "results.json", list) or []:
                found.values |= per_prompt(row)
        except (TypeError, KeyError, ValueError):
            raise UsageError(
                f"{folder / 'results.json'} is damaged", f"delete {folder}, then resume"
            ) from None
    return found


def per_prompt(row: dict) -> dict[tuple, np.ndarray]:
    """One record of an evaluation -> arrays over its prompts."""
    key, n = (row["model"], row["domain"]), int(row["samples"])
    right = np.array(row["right"], float)
    found = {key: right / n}
    for k in (int(k) for k in row["pass_at_k"]):
        wrong = [math.comb(n - int(r), k) / math.comb(n, k) for r in right]
        found[*key, f"pass@{k}"] = 1.0 - np.array(wrong)
    if "tokens" in row:
        found[*key, "tokens"] = np.array(row["tokens"], float) / n
        found[*key, "obedience"] = np.array(row["obeyed"], float) / n
    return found


def noted(parent: RunDir) -> dict[str, dict[str, float]]:
    """Stage -> its ``facts.json``, means over the seeds of a set."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in parent.runs():
        for path in sorted(run.path.glob("stages/*/facts.json")):
            for what, value in (read_json(path) or {}).items():
                if isinstance(value, int | float):
                    found.setdefault(path.parent.name, {}).setdefault(what, []).append(value)
    return {s: {k: sum(v) / len(v) for k, v in of.items()} for s, of in found.items()}


def raised(parent: RunDir) -> list[tuple[Path, str, int, int]]:
    """Evaluations whose verifier raised: folder of the stage, domain, how often, of how many."""
    paths = [p for run in parent.runs() for p in sorted(run.path.glob("stages/*/results.json"))]
    rows = [(path.parent, row) for path in paths for row in read_json(path, list) or []]
    return [
        (folder, r["domain"], r["verifier_errors"], r["n"])
        for folder, r in rows
        if r.get("verifier_errors")
    ]


def facts(record: dict) -> dict[str, float]:
    """Of a stage's record: floating-point operations of the student, and with its teachers'."""
    flops = record.get("compute", {}).get("flops", {})
    if not flops:
        return {}
    student = flops["rollout"] + flops["train"]
    return {"student flops": student, "all flops": sum(flops.values())}
