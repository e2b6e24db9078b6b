"""What the commands do that start, continue or look at runs."""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import replace
from pathlib import Path

from opdctl.checks.diagnosis import asked, commands
from opdctl.checks.diagnosis.recommend import recommend, recoverability
from opdctl.checks.preflight._stage import refuse
from opdctl.cli import console
from opdctl.config.registry import member
from opdctl.config.schema import did_you_mean
from opdctl.errors import UsageError
from opdctl.estimate import gpus
from opdctl.estimate.cost import Costs, costs
from opdctl.process.runner import Job, Outcome, carry_out, diagnose, examine
from opdctl.recipe.recipe import Recipe, load, resolve
from opdctl.recipe.source import Source, read_source
from opdctl.recipe.yaml_lines import dump
from opdctl.run import launch as run_launch
from opdctl.run import provenance
from opdctl.run.one_stage import one_stage, run_data
from opdctl.run.plan import Planned, needed, plan, ready
from opdctl.run.rundir import RunDir, lock, new_name, write_json, write_text
from opdctl.types import Finding

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
) -> int:
    """``opdctl run``. Returns the exit code."""
    recipe = load(name, size=size, overrides=overrides)
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
        return _start(recipe, source, path, old, only, planned)
    recipes = [load(name, size=size, seed=s, overrides=overrides) for s in numbers]
    parent = run_launch.new_set(recipes, source, path, only)
    return _carry_out(parent, list(zip(parent.runs(), recipes, strict=True)), only)


def run_stage(
    kind: str,
    overrides: tuple[str, ...],
    *,
    student: str,
    teachers: tuple[str, ...],
    method: str,
    out: Path | None,
    dry_run: bool,
) -> int:
    """``opdctl stage``: a recipe of one stage, built in memory. Returns the exit code."""
    tree, full, named, said = one_stage(kind, overrides, student, teachers, method)
    data = run_data([student, *(t.split("=", 1)[-1] for t in teachers)])
    own = any(o.startswith("data.") and o.split("=")[0].endswith(".kind") for o in full)
    if data and not own and "data" not in tree:
        wanted = [n for n in named if n in data]
        tree["data"] = {d: c for d, c in data.items() if not wanted or d in wanted}
        said.append(f"prompts: {', '.join(tree['data'])}, as in the run that wrote the model")
    for line in said:
        console.say(line)
    recipe = resolve(tree, f"opdctl stage {kind}", overrides=full)
    _notes(recipe)
    if dry_run:
        console.show(console.plan_table(plan(recipe)))
        return 0
    _require_engine(recipe)
    path = out or Path("runs") / new_name(kind)
    return _start(recipe, dump(tree), path, None, ())


def resume_run(directory: Path, overrides: tuple[str, ...]) -> int:
    """``opdctl resume``. Returns the exit code."""
    parent = RunDir(directory)
    pairs = []
    for run in parent.runs():
        recipe, notes = run_launch.reopen(run, overrides)
        pairs.append((run, recipe))
        for note in notes:
            console.say(note)
        todo = [p for p in plan(recipe, run) if p.action != "skip"]
        where = f"{todo[0].name}: {todo[0].action}, {'; '.join(todo[0].reasons)}" if todo else ""
        console.say(f"{run.path.name}: {where or 'every stage is done'}")
        if todo:
            _require_engine(recipe)
    return _carry_out(parent, pairs, (), rewrite=bool(overrides))


def plan_of(
    target: str,
    overrides: tuple[str, ...],
    *,
    size: str = "",
    reuse: Path | None = None,
    gpu: str = "",
) -> tuple[list[Planned], Costs | None]:
    """``opdctl plan`` of a recipe, or of a run directory as it stands; and what its stages would
    hold and take on a GPU, where the recipe runs on one or ``gpu`` names one.

    Raises:
        UsageError: no such GPU.
    """
    device = gpus.gpu(gpu or gpus.DEFAULT)
    if (Path(target) / "run.json").is_file():
        if size or reuse:
            raise UsageError("--size and --from belong to a recipe, and this is a run directory")
        pairs = [(r, run_launch.read_recipe(r, overrides)) for r in RunDir(target).runs()]
    else:
        old = RunDir(reuse) if reuse else None
        pairs = [(old, load(target, size=size, overrides=overrides))]
    several = len(pairs) > 1
    found = [(r, p) for r, recipe in pairs for p in plan(recipe, r, reuse=bool(reuse), files="all")]
    planned = [replace(p, run=r.path.name if r and several else "") for r, p in found]
    first = pairs[0][1]
    return planned, costs(first, device) if gpu or first.runtime.device == "cuda" else None


def recipes_of(
    target: str, overrides: tuple[str, ...], *, size: str = ""
) -> list[tuple[RunDir | None, Recipe]]:
    """A recipe, or those of the runs in a run directory.

    Raises:
        UsageError: neither.
        RecipeError: everything that is wrong with it.
    """
    if (Path(target) / "run.json").is_file():
        if size:
            raise UsageError("--size belongs to a recipe, and this is a run directory")
        return [(r, run_launch.read_recipe(r, overrides)) for r in RunDir(target).runs()]
    return [(None, load(target, size=size, overrides=overrides))]


def look_deep(
    pairs: list[tuple[RunDir | None, Recipe]],
) -> tuple[list[Finding], dict[str, str]]:
    """``opdctl validate --deep``: findings, and the stages checked later with the reason."""
    found, later = [], {}
    for run, recipe in pairs:
        now, missing = ready(recipe, run)
        label = f"{run.path.name}/" if run and len(pairs) > 1 else ""
        each = examine(recipe, now, run, deep=True)
        found += [replace(f, stage=label + f.stage) for f in each]
        later |= {label + stage: why for stage, why in missing.items()}
    return found, later


def _require_engine(recipe: Recipe) -> None:
    """Look for what the engine needs installed, before anything is made.

    Raises:
        UsageError: it is not there.
    """
    getattr(member("engines", recipe.runtime.engine), "require", lambda: None)()


def diagnosis_of(
    given: tuple[str, ...],
    *,
    student: str,
    teachers: tuple[str, ...],
    data: tuple[str, ...],
    stage: str,
    effort: dict,
) -> list[dict]:
    """``opdctl diagnose``: what was measured of each stage, with a recommendation for each teacher.

    Args:
        given: at most one recipe or run directory, and overrides.

    Raises:
        UsageError: a recipe and models, or neither.
    """
    targets = [text for text in given if "=" not in text]
    overrides = tuple(text for text in given if "=" in text)
    pair = student or teachers or data
    if len(targets) > 1 or bool(targets) == bool(pair):
        hint = "opdctl diagnose --student REF --teacher REF, or opdctl diagnose RECIPE|DIR"
        raise UsageError("one recipe or run directory, or a student and a teacher", hint)
    if targets:
        recipe, stages, run = asked.of_recipe(targets[0], stage, overrides)
    else:
        if stage or not (student and teachers):
            what = "--stage is of a recipe" if stage else "--student and --teacher are both needed"
            raise UsageError(what, "opdctl diagnose --student REF --teacher REF --data FILE")
        recipe, said, meant = asked.of_models(student, teachers, data, overrides)
        stages, run = ["opd"], None
        for line in said:
            console.say(line)
    found = diagnose(recipe, stages, run, effort)
    for one in found:
        for name, entry in one["teachers"].items():
            if targets:
                given = (targets[0], run is not None, one["stage"])
                lines = commands.of_stage(*given, overrides, effort)
            else:
                lines = commands.of_pair(entry, name, student, teachers, meant, overrides, effort)
            entry["recoverability"] = recoverability(entry)
            entry["recommendation"] = recommend(entry, lines)
    return found


def _refuse_early(recipe: Recipe, planned: list[Planned]) -> None:
    """Look at stages whose models are folders before anything is made, unless one is all there is:
    it looks itself as it starts.

    Raises:
        UsageError: a stage could not start when its turn comes.
    """
    todo = [p.name for p in planned if p.action != "skip"]
    now, _ = ready(recipe, public=False)
    if len(todo) > 1:
        refuse(examine(recipe, [stage for stage in now if stage in todo]))


def show_status(directory: Path | None, *, watch: bool, as_json: bool) -> None:
    """``opdctl status``."""
    from opdctl.run.status import status

    if directory is None:
        runs = sorted(Path("runs").glob("*/run.json"), key=lambda p: p.stat().st_mtime)
        if not runs:
            raise UsageError("no runs under ./runs", "opdctl status DIR")
        directory = runs[-1].parent
    while True:
        found = status(RunDir(directory))
        if as_json:
            console.emit_json(found)
        else:
            for one in found.get("runs", [found]):
                console.show(console.status_table(one))
        if not watch or found["state"] != "running":
            return
        time.sleep(2)


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
) -> int:
    run = run_launch.new_run(recipe, source, path, only)
    if old:
        reused, changed = run_launch.reuse(run, recipe, old, planned)
        console.say(f"reused from {old.path}: {', '.join(reused) or 'nothing'}")
        if changed:
            console.say(f"made again, as files they read have changed: {', '.join(changed)}")
    return _carry_out(run, [(run, recipe)], only)


def _carry_out(
    parent: RunDir, pairs: list[tuple[RunDir, Recipe]], only: tuple[str, ...], rewrite: bool = False
) -> int:
    console.say(f"run directory: {parent.path}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock(parent / ".lock", str(parent.path)))
        for run, _ in pairs:
            if run.path != parent.path:
                stack.enter_context(lock(run / ".lock", str(run.path)))
            run_launch.new_attempt(run)
        if rewrite:
            for run, recipe in pairs:
                write_text(run / "resolved.yaml", dump(recipe.to_dict()))
        jobs = [Job.of(run, recipe, only) for run, recipe in pairs]
        for planned in (p for job in jobs for p in job.planned if p.action == "blocked"):
            raise UsageError(
                f"stage {planned.name} is blocked: {planned.reasons[0]}",
                provenance.PUT_BACK,
            )
        with console.Progress(jobs) as progress:
            outcome = carry_out(jobs, progress)
        _conclude(parent, pairs, outcome)
    return outcome.code


def _conclude(parent: RunDir, pairs, outcome: Outcome) -> None:
    """Time, claims, and after a failure the three lines that matter."""
    from opdctl.cli.report import write
    from opdctl.evidence.judge import judge
    from opdctl.evidence.judge import scores as judge_scores
    from opdctl.evidence.measured import noted, raised

    for run, stage in outcome.failed:
        console.say(f"failed: {stage}: {_why(run, stage)}", "red")
        console.say(f"log:    {run / 'logs' / 'latest'}")
        console.say(f"then:   opdctl resume {parent.path}")
    if outcome.code == 75:
        console.say(f"stopped; opdctl resume {parent.path}", "yellow")
    if outcome.code == 0:
        scores, found = judge_scores(parent), judge(parent)
        if scores:
            console.show(console.scores_table(scores))
        for folder, domain, count, all_of in raised(parent):
            console.say(
                f"the verifier of data.{domain} raised on {count} of {all_of} answers, which count "
                f"as wrong: {folder.parents[1] / 'logs'}",
                "yellow",
            )
        for stage, facts in noted(parent).items():
            console.show(console.facts_table(stage, facts))
        if found:
            write_json(parent / "claims.json", {"claims": found})
            console.show(console.claims_table(found))
        console.say(f"report: {write(parent, found)}")
    console.say(_time_line(pairs))


def _why(run: RunDir, stage: str) -> str:
    record = run.record(stage)
    if record.get("status") == "failed":
        return record.get("error", "see the log")
    if shutil.disk_usage(run.path).free < 2**20:
        return f"No space left on the disk of {run.path}"
    return "it was killed" if record.get("status") == "running" else "it did not begin; see the log"


def _time_line(pairs: list[tuple[RunDir, Recipe]]) -> str:
    """Wall time of this command, and how much of its processes' time was outside stage loops.

    Process seconds are those of the stages it ran, and the wall time in which no stage ran.
    """
    now = time.time()
    ran = [
        attempt
        for run, recipe in pairs
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
