"""Measure all that ``opdctl diagnose`` reports of one stage: a student, its teachers, its prompts.

The checks of ``preflight/`` come first, and an error among them ends the diagnosis: between two
vocabularies there is no divergence. Then each teacher is measured on the student's own answers: the
agreement of the two by position, the gain in accuracy on the same prompts, and the alignment of its
signals with the task. Nothing is trained, and only ``diagnosis.json`` is written. Seeds are the
stage's, so the same command gives the same numbers.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from opdctl.checks.diagnosis import directions
from opdctl.checks.diagnosis.alignment import alignment
from opdctl.checks.diagnosis.served import ask_servers, measure_served, without_resume_hint
from opdctl.checks.diagnosis.summary import (
    mean_and_interval,
    pool_domains,
    profile,
    rollout_of_token,
    summarize_gain,
)
from opdctl.checks.preflight._checked_stage import CheckedStage
from opdctl.checks.preflight._run_checks import check
from opdctl.checks.preflight.gain import paired_accuracy
from opdctl.kernels.chunks import rows_in
from opdctl.scoring.overlap import compared, top_of


@dataclass(frozen=True)
class Effort:
    """The limits of a diagnosis.

    Attributes:
        prompts: prompts of each domain, answered once by the student and once by each teacher.
        budget: continuations sampled for the alignment of each teacher.
        top: tokens forced at each node.
        samples: continuations of each forced token.
    """

    prompts: int = 100
    budget: int = 4096
    top: int = 8
    samples: int = 8


class Progress:
    """Print progress on stderr: a line for each call, with the seconds since the start."""

    def __init__(self, stage: str) -> None:
        self.stage, self.start = stage, time.monotonic()

    def __call__(self, text: str) -> None:
        spent = time.monotonic() - self.start
        print(f"[{spent:6.1f}s] {self.stage}: {text}", file=sys.stderr, flush=True)


def measure(ctx: Any, effort: Effort) -> dict:
    """Run the checks on a stage, then measure each of its teachers.

    Returns:
        One entry of ``diagnosis.json``: the keys of the stage, ``checks``, ``refused``, and
        ``teachers`` with the measurements of each.

    Raises:
        UsageError: a model cannot be read, there are no prompts, or a server has another model or
            other tokens than named.
        StageFailed: a server does not answer, or stops answering.
    """
    progress = Progress(ctx.name)
    progress("checks")
    findings = check(ctx)
    result: dict[str, Any] = {
        "stage": ctx.name,
        "student": ctx.config.student,
        "seed": ctx.recipe.seed,
        "temperature": ctx.config.sampling.temperature,
        "max_tokens": ctx.config.sampling.max_tokens,
        "effort": asdict(effort),
        "checks": [asdict(f) for f in findings if f.severity != "ok"],
        "refused": any(f.severity == "error" and f.check != "distinct" for f in findings),
        "teachers": {},
    }
    if result["refused"]:
        return result
    stage = CheckedStage(ctx, sampled=effort.prompts)
    with without_resume_hint():
        ask_servers(stage, progress)
        _measure_teachers(ctx, stage, effort, result["teachers"], progress)
    return result


def _measure_teachers(
    ctx, stage: CheckedStage, effort: Effort, entries: dict, progress: Progress
) -> None:
    """Fill in ``entries``, one for each teacher."""
    names = [*stage.teachers, *stage.served, *stage.policy]
    distinct = [n for n in names if n in stage.served or n in stage.differing]
    if distinct:
        progress(f"the student answers {effort.prompts} prompts of {', '.join(stage.route)}")
        ctx.verdicts.verify(stage.rollouts)
    for name in names:
        same = name not in distinct
        entry = {"model": ctx.config.teachers[name].model, "domains": stage.domains(name)}
        entry |= {"same": same, "served": name in stage.served, "missing": {}}
        if not same:
            _measure_teacher(ctx, stage, name, effort, entry, progress)
        entries[name] = entry


def _measure_teacher(
    ctx, stage: CheckedStage, name: str, effort: Effort, entry: dict, progress: Progress
) -> None:
    """Fill in the entry of one teacher."""
    domains = stage.domains(name)
    progress(f"teacher {name} answers the same prompts")
    gains = {d: paired_accuracy(stage, name, d) for d in domains}
    entry["gain"] = {d: summarize_gain(accuracy) for d, accuracy in gains.items()}
    entry["gain"]["together"] = summarize_gain(pool_domains(list(gains.values())))
    rollouts = [r for r in stage.rollouts if r.prompt.domain in domains]

    def teacher_progress(text: str) -> None:
        progress(f"teacher {name}: {text}")

    if entry["served"]:
        measure_served(stage, name, rollouts, effort, entry, teacher_progress)
    else:
        _measure_local(stage.teachers[name], ctx, rollouts, effort, entry, teacher_progress)


def _measure_local(reference: str, ctx, rollouts, effort: Effort, entry: dict, progress) -> None:
    """Fill in the entry of a teacher whose weights can be read here."""
    progress("agreement on the student's answers")
    student, teacher = ctx.models.start(), ctx.models.frozen(reference)
    requests = [r.request for r in rollouts]
    table, sides = compared(ctx, student, teacher, requests, ctx.config.sampling.temperature)
    (ours_ND, our_head), (theirs_ND, their_head) = sides
    top = top_of(our_head)
    sequence_N = rollout_of_token(rollouts, ours_ND.device)
    entry["step0"] = {"top": top, "tokens": len(sequence_N)}
    entry["step0"] |= {column: mean_and_interval(v_N, sequence_N) for column, v_N in table.items()}
    entry["profile"] = profile(table, sequence_N, len(rollouts))

    def score_at(_, at_N: Tensor) -> directions.NodeScores:
        rows = (ours_ND[at_N], our_head, theirs_ND[at_N], their_head)
        size = max(1, rows_in(ctx.runtime.chunk_mib, our_head) // 16)  # it keeps as many copies
        width = min(effort.top, our_head.valid_V)
        return directions.score_nodes(*rows, candidates=width, top=top, size=size)

    entry |= alignment(ctx, [student, teacher], rollouts, score_at, effort, progress)
