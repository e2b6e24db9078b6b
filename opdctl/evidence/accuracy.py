"""The accuracies of a run, or of a set of seeds, as every table and report shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from opdctl.errors import UsageError
from opdctl.intervals import Floats, share_ends
from opdctl.run.launch import read_recipe
from opdctl.run.rundir import RunDir, read_json

Estimate = tuple[float, float, float]  # a mean and both ends of its 95 % interval


def accuracies(parent: RunDir) -> dict[str, dict[str, Estimate]]:
    """Return model -> domain -> accuracy, in the order of the recipe.

    A model that is evaluated at another temperature than 1 has a row of its own, ``NAME at T``. If
    two evaluations would still share a place, the later one is called ``NAME (STAGE)``.

    Raises:
        UsageError: not a run directory, or a file of results is damaged.
    """
    runs = [r for r in parent.runs() if (r / "run.json").is_file()]
    each: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        of_run: dict[tuple[str, str], dict[str, Any]] = {}
        for stage, temperature, row in _rows(run):
            label = row["model"] if temperature == 1.0 else f"{row['model']} at {temperature:g}"
            if (label, row["domain"]) in of_run:
                label = f"{label} ({stage})"
            of_run[label, row["domain"]] = row
        for place, row in of_run.items():
            each.setdefault(place, []).append(row)
    out: dict[str, dict[str, Estimate]] = {}
    for (label, domain), rows in each.items():
        out.setdefault(label, {})[domain] = _estimate(rows)
    return out


def _rows(run: RunDir) -> list[tuple[str, float, dict[str, Any]]]:
    """Return (stage, temperature, record) of every finished evaluation of a domain.

    Raises:
        UsageError: a file of results is damaged.
    """
    rows = []
    for name, stage in read_recipe(run).stages.items():
        sampling = stage.sampling
        path = run.stage(name) / "results.json"
        if sampling is None or run.record(name).get("status") != "done" or not path.exists():
            continue
        for row in read_json(path, list) or [None]:
            rows.append((name, float(sampling.temperature), _checked(row, path)))
    return rows


def _checked(row: Any, path: Path) -> dict[str, Any]:
    try:
        if _shares(row).size and row["model"] and row["domain"]:
            return row
    except (TypeError, KeyError, ValueError):
        pass
    raise UsageError(f"{path} is damaged", f"delete {path.parent}, then resume")


def _shares(row: dict[str, Any]) -> Floats:
    """Return the share of right samples of each prompt."""
    return np.array(row["right"], float) / int(row["samples"])


def _estimate(rows: list[dict[str, Any]]) -> Estimate:
    """Return the mean over seeds and its interval, whatever ``ci95`` an old record holds."""
    each = [_shares(row) for row in rows]
    low, high = share_ends(each)
    return float(np.mean([v.mean() for v in each])), float(low), float(high)
