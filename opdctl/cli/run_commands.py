"""The commands that run stages: run, stage and resume."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

from opdctl.checks.preflight._run_checks import raise_errors
from opdctl.cli import console
from opdctl.config.registry import member
from opdctl.config.schema import did_you_mean
from opdctl.errors import OpdctlError, UsageError
from opdctl.estimate.memory import format_bytes
from opdctl.process.detach import detach
from opdctl.process.runner import Job, Outcome, carry_out, examine
from opdctl.process.streams import outlive_the_terminal
from opdctl.recipe.recipe import Recipe, load, resolve
from opdctl.recipe.source import Source, read_source
from opdctl.recipe.yaml_lines import dump
from opdctl.run import launch as run_launch
from opdctl.run import provenance
from opdctl.run.one_stage import one_stage, run_data
from opdctl.run.plan import Planned, needed, plan, ready
from opdctl.run.rundir import RunDir, lock, new_name, write_json, write_text
from opdctl.run.tidy import tidy

STARTED = time.time()


def run_recipe(
    name: str,
    overrides: tuple[str, ...],
    *,
    size: str = "",
    seeds: str = "",
    out: Path | None = None,
    reuse: Path | None = None,
    only: tuple[str, ...] = (),
    dry_run: bool = False,
    detached: bool = False,
) -> int:
    """Plan a recipe and carry it out: ``opdctl run``. Return the exit code."""
    recipe = load(name, size=size, overrides=overrides, trusted=not dry_run)
    for stage in only:
        if stage not in recipe.stages:
            near = did_you_mean(stage, recipe.stages, "stages:")
            raise UsageError(f"--only {stage}: no such stage", near)
    _notes(recipe)
    old = RunDir(reuse) if reuse else None
    numbers = run_launch.parse_seeds(seeds) if seeds else []
    if old and numbers:
        raise UsageError("--from with --seeds: seeds reuse nothing from each other or elsewhere")
    planned = plan(recipe, old, reuse=True)
    wanted = needed(recipe, *only) if only else set(recipe.stages)
    shown = [p for p in planned if p.name in wanted]
    if dry_run:
        console.show(console.plan_table(shown))
        return 0
    _require_engine(recipe)
    _refuse_early(recipe, shown)
    source = read_source(name)
    path = out or Path("runs") / new_name(recipe.name)
    if not seeds:
        return _start(recipe, source, path, old, only, planned, detached)
    recipes = [load(name, size=size, seed=s, overrides=overrides, trusted=True) for s in numbers]
    parent = run_launch.new_set(recipes, source, path, only)
    return _carry_out(parent, list(zip(parent.runs(), recipes, strict=True)), only, detached)


def run_stage(
    kind: str,
    overrides: tuple[str, ...],
    *,
    student: str,
    teachers: tuple[str, ...],
    method: str,
    out: Path | None,
    dry_run: bool,
    detached: bool = False,
) -> int:
    """Build a recipe of one stage and carry it out: ``opdctl stage``. Return the exit code."""
    tree, full, named, notes = one_stage(kind, overrides, student, teachers, method)
    data = run_data([student, *(t.split("=", 1)[-1] for t in teachers)])
    own = any(o.startswith("data.") and o.split("=")[0].endswith(".kind") for o in full)
    if data and not own and "data" not in tree:
        wanted = [n for n in named if n in data]
        tree["data"] = {d: c for d, c in data.items() if not wanted or d in wanted}
        notes.append(f"prompts: {', '.join(tree['data'])}, as in the run that wrote the model")
    for line in notes:
        console.say(line)
    recipe = resolve(tree, f"opdctl stage {kind}", overrides=full, trusted=True)
    _notes(recipe)
    if dry_run:
        console.show(console.plan_table(plan(recipe)))
        return 0
    _require_engine(recipe)
    path = out or Path("runs") / new_name(kind)
    return _start(recipe, dump(tree), path, None, (), detached=detached)


def resume_run(directory: Path, overrides: tuple[str, ...], detached: bool = False) -> int:
    """Continue a run or a set of seeds: ``opdctl resume``. Return the exit code."""
    parent = RunDir(directory)
    runs = []
    for run in parent.runs():
        recipe, notes = run_launch.reopen(run, overrides)
        runs.append((run, recipe))
        for note in notes:
            console.say(note)
        todo = [p for p in plan(recipe, run) if p.action != "skip"]
        where = f"{todo[0].name}: {todo[0].action}, {'; '.join(todo[0].reasons)}" if todo else ""
        console.say(f"{run.path.name}: {where or 'every stage is done'}")
        if todo:
            _require_engine(recipe)
    return _carry_out(parent, runs, (), detached, rewrite=bool(overrides))


def _require_engine(recipe: Recipe) -> None:
    """Require that the packages of the sampling engine are installed, before anything is created.

    Raises:
        UsageError: one is missing.
    """
    member("engines", recipe.runtime.engine).require()


def _refuse_early(recipe: Recipe, planned: list[Planned]) -> None:
    """Run the cheap checks before creating the run directory.

    Checked are stages whose models are folders. A run of a single stage is not checked here: the
    stage checks itself at its start.

    Raises:
        UsageError: a check reports an error.
    """
    todo = [p.name for p in planned if p.action != "skip"]
    now, _ = ready(recipe, public=False)
    if len(todo) > 1:
        raise_errors(examine(recipe, [stage for stage in now if stage in todo]))


def _notes(recipe: Recipe) -> None:
    for note in recipe.notes():
        console.say(f"note: {note}", "yellow")


def _start(
    recipe: Recipe,
    source: Source | str,
    path: Path,
    old: RunDir | None,
    only: tuple[str, ...],
    planned: list[Planned] | None = None,
    detached: bool = False,
) -> int:
    run = run_launch.new_run(recipe, source, path, only)
    if old:
        with lock(run / ".lock", str(run.path)):  # nobody continues it before that is over
            reused, changed = run_launch.reuse(run, recipe, old, planned)
        console.say(f"reused from {old.path}: {', '.join(reused) or 'nothing'}")
        if changed:
            console.say(f"made again, as files they read have changed: {', '.join(changed)}")
    return _carry_out(run, [(run, recipe)], only, detached)


def _carry_out(
    parent: RunDir,
    runs: list[tuple[RunDir, Recipe]],
    only: tuple[str, ...],
    detached: bool = False,
    rewrite: bool = False,
) -> int:
    outlive_the_terminal()
    console.say(f"run directory: {parent.path}")
    begun = None
    if detached:
        message = f"it goes on without this terminal: opdctl status --watch {parent.path}"
        begun = detach(parent / "logs" / "detached.log", message)
        console.err.soft_wrap = True  # what follows is a file
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock(parent / ".lock", str(parent.path)))
        for run, _ in runs:
            if run.path != parent.path:
                stack.enter_context(lock(run / ".lock", str(run.path)))
            run_launch.new_attempt(run)
            freed = tidy(run)
            if freed:
                console.say(f"{format_bytes(freed)} removed that no record needed")
        if rewrite:
            for run, recipe in runs:
                write_text(run / "resolved.yaml", dump(recipe.to_dict()))
        jobs = [Job.of(run, recipe, only) for run, recipe in runs]
        for planned in (p for job in jobs for p in job.planned if p.action == "blocked"):
            raise UsageError(
                f"stage {planned.name} is blocked: {planned.reasons[0]}",
                provenance.PUT_BACK,
            )
        if begun:
            begun()
        with console.Progress(jobs) as progress:
            outcome = carry_out(jobs, progress)
        _conclude(parent, runs, outcome)
    return outcome.code


def _conclude(parent: RunDir, runs, outcome: Outcome) -> None:
    """Print scores, claims and time; after a failure its cause, its log and how to resume."""
    from opdctl.cli.report import write
    from opdctl.evidence.accuracy import accuracies
    from opdctl.evidence.judge import judge
    from opdctl.evidence.measured import stage_facts, verifier_errors

    for run, stage in outcome.failed:
        console.say(f"failed: {stage}: {_why(run, stage)}", "red")
        console.say(f"log:    {run / 'logs' / 'latest'}")
        console.say(f"then:   opdctl resume {parent.path}")
    for run, recipe in runs:
        for stage in recipe.stages:
            for line in run.record(stage).get("rounding", []):
                console.say(f"{stage}: equal up to rounding only: {line}", "yellow")
    if outcome.code == 75:
        console.say(f"stopped; opdctl resume {parent.path}", "yellow")
    if outcome.code == 0:
        scores, claims = accuracies(parent), judge(parent)
        if scores:
            console.show(console.scores_table(scores))
        for folder, domain, count, all_of in verifier_errors(parent):
            console.say(
                f"the verifier of data.{domain} raised on {count} of {all_of} answers, which count "
                f"as wrong: {folder.parents[1] / 'logs'}",
                "yellow",
            )
        for stage, facts in stage_facts(parent).items():
            console.show(console.facts_table(stage, facts))
        if claims:
            write_json(parent / "claims.json", {"claims": claims})
            console.show(console.claims_table(claims))
        console.say(f"report: {write(parent, claims, at_end=True)}")
    else:
        with contextlib.suppress(OpdctlError, OSError):  # the cause stands above
            write(parent, at_end=True)
    console.say(_time_line(runs))


def _why(run: RunDir, stage: str) -> str:
    record = run.record(stage)
    if record.get("status") == "failed":
        return record.get("error", "see the log")
    if shutil.disk_usage(run.path).free < 2**20:
        return f"No space left on the disk of {run.path}"
    return "it was killed" if record.get("status") == "running" else "it did not begin; see the log"


def _time_line(runs: list[tuple[RunDir, Recipe]]) -> str:
    """Return a line with the wall time of this command and its share outside stage loops.

    Process seconds are those of the stages it ran, and the wall time in which no stage ran.
    """
    now = time.time()
    ran = [
        attempt
        for run, recipe in runs
        for stage in recipe.stages
        for attempt in run.record(stage).get("attempts", [])
        if attempt["started"] >= STARTED
    ]
    covered, end = 0.0, STARTED
    for attempt in sorted(ran, key=lambda a: a["started"]):
        stop = attempt["started"] + attempt["seconds"]
        covered += max(0.0, stop - max(end, attempt["started"]))
        end = max(end, stop)
    wall = now - STARTED
    whole = sum(a["seconds"] for a in ran) + wall - covered
    outside = whole - sum(a["loop_seconds"] for a in ran)
    return (
        f"{wall:.1f} s; outside stage loops (start, load, save, plan, report) {outside:.1f} of "
        f"{whole:.1f} process seconds, {100 * outside / whole:.0f} %"
    )
