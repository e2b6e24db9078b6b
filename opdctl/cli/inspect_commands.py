"""The commands that run no stage: plan, validate, diagnose and status."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from opdctl.checks.diagnosis import diagnosed_recipe, next_commands
from opdctl.checks.diagnosis.recommend import recommend, recoverability
from opdctl.cli import console
from opdctl.errors import UsageError
from opdctl.estimate import gpus
from opdctl.estimate.cost import Costs, costs
from opdctl.process.runner import diagnose, examine
from opdctl.recipe.recipe import Recipe, load
from opdctl.run import launch as run_launch
from opdctl.run.plan import Planned, plan, ready
from opdctl.run.rundir import RunDir
from opdctl.types import Finding


def plan_target(
    target: str,
    overrides: tuple[str, ...],
    *,
    size: str = "",
    reuse: Path | None = None,
    gpu: str = "",
) -> tuple[list[Planned], Costs | None]:
    """Plan a recipe, or a run directory as it stands: ``opdctl plan``.

    Returns:
        The planned stages; and their memory and time on a GPU, where the recipe runs on one or
        ``gpu`` names one.

    Raises:
        UsageError: no such GPU, or an option that a run directory does not take.
    """
    device = gpus.gpu(gpu or gpus.DEFAULT)
    if (Path(target) / "run.json").is_file():
        if size or reuse:
            raise UsageError("--size and --from belong to a recipe, and this is a run directory")
        runs = [(r, run_launch.read_recipe(r, overrides)) for r in RunDir(target).runs()]
    else:
        old = RunDir(reuse) if reuse else None
        runs = [(old, load(target, size=size, overrides=overrides))]
    several = len(runs) > 1
    stages = [(r, p) for r, recipe in runs for p in plan(recipe, r, reuse=bool(reuse), files="all")]
    labelled = [replace(p, run=r.path.name if r and several else "") for r, p in stages]
    first = runs[0][1]
    return labelled, costs(first, device) if gpu or first.runtime.device == "cuda" else None


def load_target(
    target: str, overrides: tuple[str, ...], *, size: str = ""
) -> list[tuple[RunDir | None, Recipe]]:
    """Load a recipe, or the recipes of the runs in a run directory.

    Raises:
        UsageError: the target is neither.
        RecipeError: the recipe has problems; it holds all of them.
    """
    if (Path(target) / "run.json").is_file():
        if size:
            raise UsageError("--size belongs to a recipe, and this is a run directory")
        return [(r, run_launch.read_recipe(r, overrides)) for r in RunDir(target).runs()]
    return [(None, load(target, size=size, overrides=overrides))]


def check_deeply(
    runs: list[tuple[RunDir | None, Recipe]],
) -> tuple[list[Finding], dict[str, str]]:
    """Run all checks on the stages whose models exist: ``opdctl validate --deep``.

    Returns:
        The findings; and for each stage that can only be checked later, the reason.
    """
    findings, later = [], {}
    for run, recipe in runs:
        here, missing = ready(recipe, run)
        label = f"{run.path.name}/" if run and len(runs) > 1 else ""
        each = examine(recipe, here, run, deep=True)
        findings += [replace(f, stage=label + f.stage) for f in each]
        later |= {label + stage: why for stage, why in missing.items()}
    return findings, later


def diagnose_stages(
    words: tuple[str, ...],
    *,
    student: str,
    teachers: tuple[str, ...],
    data: tuple[str, ...],
    stage: str,
    effort: dict,
) -> list[dict]:
    """Measure stages and recommend what to do with each teacher: ``opdctl diagnose``.

    Args:
        words: at most one recipe or run directory, and overrides.

    Returns:
        An entry for each stage, see ``checks/diagnosis/measure.py``, with a recommendation for each
        teacher.

    Raises:
        UsageError: both a recipe and models are named, or neither is.
    """
    targets = [text for text in words if "=" not in text]
    overrides = tuple(text for text in words if "=" in text)
    models = student or teachers or data
    if len(targets) > 1 or bool(targets) == bool(models):
        hint = "opdctl diagnose --student REF --teacher REF, or opdctl diagnose RECIPE|DIR"
        raise UsageError("one recipe or run directory, or a student and a teacher", hint)
    if targets:
        recipe, stages, run = diagnosed_recipe.from_recipe(targets[0], stage, overrides)
        entries = {}
    else:
        if stage or not (student and teachers):
            wrong = "--stage is of a recipe" if stage else "--student and --teacher are both needed"
            raise UsageError(wrong, "opdctl diagnose --student REF --teacher REF --data FILE")
        recipe, notes, entries = diagnosed_recipe.from_models(student, teachers, data, overrides)
        stages, run = ["opd"], None
        for line in notes:
            console.say(line)
    measured = diagnose(recipe, stages, run, effort)
    for of_stage in measured:
        for name, entry in of_stage["teachers"].items():
            if targets:
                commands = next_commands.for_stage(
                    targets[0], run is not None, of_stage["stage"], overrides, effort
                )
            else:
                commands = next_commands.for_models(
                    entry, name, student, teachers, entries, overrides, effort
                )
            entry["recoverability"] = recoverability(entry)
            entry["recommendation"] = recommend(entry, commands)
    return measured


def show_status(directory: Path | None, *, watch: bool, as_json: bool) -> None:
    """Print the state of a run, or of the newest one under ./runs: ``opdctl status``.

    Raises:
        UsageError: not a run directory, or there is none.
    """
    from opdctl.run.status import status

    if directory is None:
        runs = sorted(Path("runs").glob("*/run.json"), key=lambda p: p.stat().st_mtime)
        if not runs:
            raise UsageError("no runs under ./runs", "opdctl status DIR")
        directory = runs[-1].parent
    while True:
        state = status(RunDir(directory))
        if as_json:
            console.emit_json(state)
        else:
            for one in state.get("runs", [state]):
                console.show(console.status_table(one))
        if not watch or state["state"] != "running":
            return
        time.sleep(2)
