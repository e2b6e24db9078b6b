"""Read the measurements of runs for claims: scores per prompt, facts of a stage, learning curves.

Scores come from the evaluations at temperature 1 and are kept per prompt, so that a bootstrap over
prompts can weigh the same prompts for every model and on every seed. Facts come from the stages'
records (the ledger) and their results; curves from metrics.jsonl.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opdctl import draws
from opdctl.errors import UsageError
from opdctl.run.launch import read_recipe
from opdctl.run.rundir import RunDir, read_json, read_rows

RESAMPLES = 2000


Key = tuple[str, ...]  # (model, domain) or (model, domain, kind)
Number = float | NDArray[np.float64]  # of one run, or of its resamples


class Scores(dict[Key, Any]):
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

    def curve(self, stage: str, name: str) -> list[Any]:
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

    values: dict[Key, NDArray[np.float64]] = field(default_factory=dict)
    facts: dict[tuple[str, str], float] = field(default_factory=dict)
    rows: dict[str, list[dict]] = field(default_factory=dict)

    def scores(self) -> Scores:
        """Return the means over prompts."""
        means = Scores((k, np.mean(v)) for k, v in self.values.items())
        means.measured = self
        return means

    def resampled(self, seed: int = 0) -> Scores:
        """Return the means over reweighed prompts, [RESAMPLES] each.

        All models share the weights, and so do all runs resampled with one seed.
        """
        scores = _Resampled()
        scores.measured, scores.seed = self, seed
        return scores


def is_share(key: Key) -> bool:
    """Return True for a score from 0 to 1: all but the tokens."""
    return key[2:] != ("tokens",)


class _Resampled(Scores):
    """The scores of the resamples, each computed on first use.

    A resample gives the prompts of a domain the weights of a Bayesian bootstrap (Rubin, The Annals
    of Statistics 9:130, 1981), and of a share two further prompts, on each of which every model is
    right or wrong at even odds (for two models Agresti and Min, Statistics in Medicine 24:729,
    2005, who add half a prompt to each of the four outcomes). So neither 0 of 20 is a certainty,
    nor are equal answers of two models to each of 20 prompts.
    """

    seed: int

    def __missing__(self, key: Key) -> NDArray[np.float64]:
        value, domain = self.measured.values[key], key[1]
        weights = _weights(self.seed, domain, len(value))
        inner, added = weights[:, : len(value)], weights[:, len(value) :]
        if not is_share(key):
            inner = inner / inner.sum(axis=1, keepdims=True)
            self[key] = value[0] + inner @ (value - value[0])
            return self[key]
        rng = np.random.default_rng(draws.key(self.seed, key))
        self[key] = inner @ value + (added * rng.integers(0, 2, added.shape)).sum(axis=1)
        return self[key]


@functools.lru_cache(maxsize=4)  # runs and models share them
def _weights(seed: int, domain: str, count: int) -> NDArray[np.float64]:
    """Return the weights of a domain's prompts and of two more, [RESAMPLES, count + 2]."""
    rng = np.random.default_rng(draws.key(seed, domain))
    weights = rng.standard_exponential((RESAMPLES, count + 2))
    return weights / weights.sum(axis=1, keepdims=True)


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


def per_prompt(row: dict) -> dict[Key, NDArray[np.float64]]:
    """Turn one record of an evaluation into arrays over its prompts, by score."""
    key, n = (row["model"], row["domain"]), int(row["samples"])
    right = np.array(row["right"], float)
    arrays: dict[Key, NDArray[np.float64]] = {key: right / n}
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
