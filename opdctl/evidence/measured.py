"""Read the measurements of runs for claims: scores per prompt, facts of a stage, learning curves.

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
    """The scores of one run: means over prompts, or those of all resamples as arrays.

    ``scores[model, domain]`` is the accuracy; ``scores[model, domain, kind]`` is ``tokens`` per
    response, ``obedience`` to the mode, or ``pass@K``. ``fact`` and ``curve`` are the same for all
    resamples.
    """

    measured: Measured

    def fact(self, stage: str, name: str) -> Any:
        """Return a number of a stage, see ``Measured.facts``.

        Raises:
            KeyError: it was not measured.
        """
        value = self.measured.facts.get((stage, name))
        if value is None:
            raise KeyError((stage, name))
        return value

    def curve(self, stage: str, name: str) -> list[dict]:
        """Return a key of the stage's metrics, step by step.

        Raises:
            KeyError: it was not measured.
        """
        rows = [row[name] for row in self.measured.rows.get(stage, []) if name in row]
        if not rows:
            raise KeyError((stage, name))
        return rows


@dataclass
class Measured:
    """The measurements of one run.

    Attributes:
        values: a score of each prompt, by (model, domain) or (model, domain, kind).
        facts: numbers by (stage, name).
        rows: the metrics of each stage.
    """

    values: dict[tuple, np.ndarray] = field(default_factory=dict)
    facts: dict[tuple[str, str], float] = field(default_factory=dict)
    rows: dict[str, list[dict]] = field(default_factory=dict)

    def scores(self) -> Scores:
        """Return the means over prompts."""
        means = Scores((k, np.mean(v)) for k, v in self.values.items())
        means.measured = self
        return means

    def resampled(self, seed: int = 0) -> Scores:
        """Return the means over resampled prompts, [RESAMPLES] each; all models share the draws."""
        scores = _Resampled()
        scores.measured, scores.seed, scores.drawn = self, seed, {}
        return scores


class _Resampled(Scores):
    """The scores of the resamples, each computed on first use.

    Where all of the prompts were failed, or none, every resample would be the same: their shares
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


def read_measurements(run: RunDir) -> Measured:
    """Read the finished stages of a run; of the evaluations only those at temperature 1.

    Raises:
        UsageError: a file of results is damaged.
    """
    result, recipe = Measured(), read_recipe(run)
    for name, stage in recipe.stages.items():
        record = run.record(name)
        if record.get("status") != "done":
            continue
        folder = run.stage(name)
        of_stage = compute_facts(record) | (read_json(folder / "facts.json") or {})
        result.facts |= {(name, k): v for k, v in of_stage.items()}
        result.rows[name] = read_rows(folder / "metrics.jsonl")
        if stage.sampling is None or stage.sampling.temperature != 1.0:
            continue
        try:
            for row in read_json(folder / "results.json", list) or []:
                result.values |= per_prompt(row)
        except (TypeError, KeyError, ValueError):
            raise UsageError(
                f"{folder / 'results.json'} is damaged", f"delete {folder}, then resume"
            ) from None
    return result


def per_prompt(row: dict) -> dict[tuple, np.ndarray]:
    """Turn one record of an evaluation into arrays over its prompts, by score."""
    key, n = (row["model"], row["domain"]), int(row["samples"])
    right = np.array(row["right"], float)
    arrays = {key: right / n}
    for k in (int(k) for k in row["pass_at_k"]):
        wrong = [math.comb(n - int(r), k) / math.comb(n, k) for r in right]
        arrays[*key, f"pass@{k}"] = 1.0 - np.array(wrong)
    if "tokens" in row:
        arrays[*key, "tokens"] = np.array(row["tokens"], float) / n
        arrays[*key, "obedience"] = np.array(row["obeyed"], float) / n
    return arrays


def stage_facts(parent: RunDir) -> dict[str, dict[str, float]]:
    """Return stage -> its ``facts.json``, means over the seeds of a set."""
    by_stage: dict[str, dict[str, list[float]]] = {}
    for run in parent.runs():
        for path in sorted(run.path.glob("stages/*/facts.json")):
            for fact, value in (read_json(path) or {}).items():
                if isinstance(value, int | float):
                    by_stage.setdefault(path.parent.name, {}).setdefault(fact, []).append(value)
    return {s: {k: sum(v) / len(v) for k, v in of.items()} for s, of in by_stage.items()}


def verifier_errors(parent: RunDir) -> list[tuple[Path, str, int, int]]:
    """Return the evaluations whose verifier raised: (folder of the stage, domain, number of
    errors, number of answers)."""
    paths = [p for run in parent.runs() for p in sorted(run.path.glob("stages/*/results.json"))]
    rows = [(path.parent, row) for path in paths for row in read_json(path, list) or []]
    return [
        (folder, r["domain"], r["verifier_errors"], r["n"])
        for folder, r in rows
        if r.get("verifier_errors")
    ]


def compute_facts(record: dict) -> dict[str, float]:
    """Return the floating-point operations in a stage's record: the student's, and all."""
    flops = record.get("compute", {}).get("flops", {})
    if not flops:
        return {}
    student = flops["rollout"] + flops["train"]
    return {"student flops": student, "all flops": sum(flops.values())}
