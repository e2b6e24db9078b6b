"""The sample of a step's rollouts that is kept for a reader: ``rollouts/step-000040.jsonl``.

A line is a rollout: what it is (``FIELDS``), then each per-token column of the step as a list. A
column that is called as a field is keeps both: ``teacher`` is the teacher's name, and its log-probs
are ``teacher_per_token``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opdctl.models import packing
from opdctl.run.rundir import finite, write_text
from opdctl.scoring.columns import DOMAIN
from opdctl.train.step import Step
from opdctl.types import Rollout

FIELDS = (
    "domain",
    "prompt",
    "response",
    "before",
    "answer",
    "reward",
    "teacher",
    "truncated",
    "ids",
)
PER_TOKEN = "_per_token"


def key_of(column: str) -> str:
    """Return the key of a column in a line of the log, which no field has and no other column."""
    free = column not in FIELDS and not column.endswith(PER_TOKEN)
    return column if free else column + PER_TOKEN


def fields_of(rollout: Rollout) -> dict[str, Any]:
    """Return what a rollout is, by name; ``before`` is left out where it is empty."""
    values = (
        rollout.prompt.domain,
        rollout.prompt.text,
        rollout.text,
        rollout.before,
        rollout.prompt.answer,
        rollout.reward,
        rollout.teacher,
        rollout.truncated,
        rollout.response_ids,
    )
    fields: dict[str, Any] = dict(zip(FIELDS, values, strict=True))
    return fields if rollout.before else {k: v for k, v in fields.items() if k != "before"}


def log_rollouts(folder: Path, done: int, step: Step, most: int) -> None:
    """Write about ``most`` of the rollouts of a step, spread over all of its domains.

    Args:
        folder: of the stage.
        done: the number of the step, from 1.
    """
    lengths = [r.length for r in step.rollouts]
    # the number of a domain stands for its name, which is there
    flat = {k: v for k, v in step.columns.items() if v.ndim == 1 and k != DOMAIN}
    vectors = {key_of(k): packing.lists_per_sequence(v, lengths) for k, v in flat.items()}
    apart = -(-len(step.rollouts) // most)
    lines = [
        json.dumps(finite({**fields_of(r), **{k: v[i] for k, v in vectors.items()}}))
        for i, r in list(enumerate(step.rollouts))[::apart]
    ]
    write_text(folder / "rollouts" / f"step-{done:06d}.jsonl", "\n".join([*lines, ""]))
