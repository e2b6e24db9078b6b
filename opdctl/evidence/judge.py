"""Judge claims on the measurements of runs: the estimate, its interval, the verdict.

The interval of a mean over seeds has the scatter of the seeds and that of the prompts in it
(``opdctl/intervals.py`` has the formula); on one seed it has that of the prompts alone, by a
bootstrap with the same weights for every model. A number that is no score of prompts, such as a
count of operations, has the scatter of the seeds alone. A claim *holds* if the estimate of each
condition meets its threshold and its interval stays within delta of it or beyond; it is *refuted*
if the whole interval of some condition misses; else it is undecided. Thresholds stand in
``claims/`` and are not arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opdctl.config.registry import member
from opdctl.evidence.accuracy import Estimate
from opdctl.evidence.measured import (
    RESAMPLES,
    Measured,
    Scores,
    is_share,
    read_measurements,
)
from opdctl.evidence.verdict import Condition, verdict
from opdctl.intervals import mean_ends, resampled_ends, share_ends
from opdctl.run.launch import read_recipe
from opdctl.run.rundir import RunDir


def scores(parent: RunDir, *kind: str) -> dict[str, dict[str, Estimate]]:
    """Return model -> domain -> (mean, low, high): a score and its 95 % interval.

    The interval is over prompts, and over seeds where there are several.

    Args:
        kind: nothing for the accuracy, else one of ``tokens``, ``obedience``, ``pass@K``.
    """
    runs = [read_measurements(r) for r in parent.runs() if (r / "run.json").is_file()]
    out: dict[str, dict[str, Estimate]] = {}
    wanted = [k for m in runs for k in m.values if k[2:] == kind]
    for key in dict.fromkeys(wanted):
        each = [m.values[key] for m in runs if key in m.values]
        low, high = (share_ends if is_share(key) else mean_ends)(each)
        mean = float(np.mean([v.mean() for v in each]))
        out.setdefault(key[0], {})[key[1]] = (mean, float(low), float(high))
    return out


def judge(parent: RunDir) -> list[dict[str, Any]]:
    """Return a record for each claim of the recipe: thresholds, measurements, verdict.

    Raises:
        UsageError: not a run directory.
    """
    runs = [r for r in parent.runs() if (r / "run.json").is_file()]
    if not runs:
        return []
    recipe = read_recipe(runs[0])
    if not recipe.claims:
        return []
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


def _decide(conditions: list[Condition], runs: list[Measured]) -> dict[str, Any]:
    """Return what was measured of a claim's conditions, with intervals, and whether it holds."""
    means, drawn = [m.scores() for m in runs], [m.resampled() for m in runs]
    values, intervals, verdicts = {}, {}, []
    for condition in conditions:
        each = np.array([float(_number(condition.value, of)) for of in means])
        of_prompts = np.stack([_spread(condition.value, of) for of in drawn])
        estimate, (low, high) = float(each.mean()), resampled_ends(each, of_prompts)
        values[condition.name], intervals[condition.name] = estimate, [low, high]
        verdicts.append(verdict(condition, estimate, low, high))
    return {"measured": values, "interval": intervals, "holds": together(conditions, verdicts)}


def together(conditions: list[Condition], verdicts: list[bool | None]) -> bool | None:
    """Return the verdict on a claim from those on its conditions; None without any."""
    pairs = list(zip(conditions, verdicts, strict=True))
    either = [v for c, v in pairs if c.alternative]
    all_of = [v for c, v in pairs if not c.alternative]
    if either:
        all_of.append(True if True in either else None if None in either else False)
    if False in all_of:
        return False
    return None if None in all_of or not all_of else True


def _number(value: Callable[[Scores], Any], scores: Scores) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):  # a gap of 0 in some resample
        return value(scores)


def _spread(value: Callable[[Scores], Any], scores: Scores) -> NDArray[np.float64]:
    """Return a number on all resamples, [R]; a number that is no score of prompts has one value."""
    drawn = np.atleast_1d(np.asarray(_number(value, scores), float))
    return drawn if len(drawn) > 1 else np.repeat(drawn, RESAMPLES)
