"""Judge claims on the measurements of runs: the estimate, its interval, the verdict.

On several seeds the interval is a 95 % t-interval over seeds; on one seed a bootstrap over prompts,
the same resample for every model. A claim *holds* if the estimate of each condition meets its
threshold and its interval stays within delta of it or beyond; it is *refuted* if the whole interval
of some condition misses; else it is undecided. Thresholds stand in ``claims/`` and are not
arguments.
"""

from __future__ import annotations

import math

import numpy as np

from opdctl.config.registry import member
from opdctl.evidence.measured import Measured, read_measurements
from opdctl.evidence.verdict import Condition, verdict
from opdctl.intervals import wilson
from opdctl.run.launch import read_recipe
from opdctl.run.rundir import RunDir

# two-sided 97.5 % quantiles of Student's t for 1 .. 30 degrees of freedom
T975 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
    2.080,
    2.074,
    2.069,
    2.064,
    2.060,
    2.056,
    2.052,
    2.048,
    2.045,
    2.042,
)


def scores(parent: RunDir, *kind: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Return model -> domain -> (mean, 95 % half-width) of a score.

    The interval is over prompts, or over seeds where there are several.

    Args:
        kind: nothing for the accuracy, else one of ``tokens``, ``obedience``, ``pass@K``.
    """
    runs = [read_measurements(r) for r in parent.runs() if (r / "run.json").is_file()]
    out: dict[str, dict[str, tuple[float, float]]] = {}
    wanted = [k for m in runs for k in m.values if k[2:] == kind]
    for key in dict.fromkeys(wanted):
        each = [m.values[key] for m in runs if key in m.values]
        values = [float(np.mean(v)) for v in each]
        count = len(each[0])
        half = 1.96 * float(np.std(each[0], ddof=1)) / math.sqrt(count) if count > 1 else 0.0
        if len(values) > 1:
            half = t_half_width(values)
        elif not half and len(key) == 2:  # all right, all wrong, or one prompt
            half = max(abs(end - values[0]) for end in wilson(values[0], count))
        out.setdefault(key[0], {})[key[1]] = (sum(values) / len(values), half)
    return out


def t_half_width(values: list[float]) -> float:
    """Return half the 95 % t-interval of a mean of at least two values."""
    n = len(values)
    return T975[min(n - 1, 30) - 1] * float(np.std(values, ddof=1)) / math.sqrt(n)


def judge(parent: RunDir) -> list[dict]:
    """Return a record for each claim of the recipe: thresholds, measurements, verdict.

    Raises:
        UsageError: not a run directory.
    """
    runs = [r for r in parent.runs() if (r / "run.json").is_file()]
    if not runs:
        return []
    recipe = read_recipe(runs[0])
    seeds = [r.manifest()["seed"] for r in runs]
    measurements = [read_measurements(r) for r in runs]
    out = []
    for name, roles in recipe.claims.items():
        claim = member("claims", name.lower())
        record = {
            "name": name,
            "statement": claim.statement,
            "source": claim.source,
            "reported": claim.reported,
            "threshold": claim.threshold,
            "seeds": seeds,
            "holds": None,
            "measured": {},
            "interval": {},
            "note": "",
        }
        try:
            conditions, notes = claim.conditions(roles, measurements)
            record |= _decide(conditions, measurements)
            record["note"] = notes
        except KeyError as missing:
            name = missing.args[0]
            words = map(str, name) if isinstance(name, tuple) else [str(name)]
            record["note"] = f"not measured yet: {' '.join(words)}"
        out.append(record)
    return out


def _decide(conditions: list[Condition], runs: list[Measured]) -> dict:
    values, intervals, verdicts = {}, {}, []
    for condition in conditions:
        with np.errstate(divide="ignore", invalid="ignore"):  # a gap of 0 in some resample
            each = [float(condition.value(m.scores())) for m in runs]
            estimate = sum(each) / len(each)
            if len(each) > 1:
                half = t_half_width(each)
                low, high = estimate - half, estimate + half
            else:
                drawn = np.atleast_1d(condition.value(runs[0].resampled()))
                low, high = np.quantile(drawn, [0.025, 0.975])
        values[condition.name], intervals[condition.name] = estimate, [float(low), float(high)]
        verdicts.append(verdict(condition, estimate, float(low), float(high)))
    either = [v for p, v in zip(conditions, verdicts, strict=True) if p.alternative]
    verdicts = [v for p, v in zip(conditions, verdicts, strict=True) if not p.alternative]
    if either:
        verdicts.append(True if True in either else None if None in either else False)
    holds = all(verdicts) if None not in verdicts else None
    if False in verdicts:
        holds = False
    return {"measured": values, "interval": intervals, "holds": holds if conditions else None}
