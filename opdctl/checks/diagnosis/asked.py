"""The recipe that ``opdctl diagnose`` is about: one opd stage of what stands on the command line,
or a stage of a recipe or of a run whose models are there."""

from __future__ import annotations

import difflib
import re
import shlex
from pathlib import Path

from opdctl.config import references
from opdctl.config.schema import did_you_mean
from opdctl.errors import UsageError
from opdctl.recipe.recipe import Recipe, load, resolve
from opdctl.recipe.source import read_source, shipped
from opdctl.run import launch
from opdctl.run.one_stage import one_stage, run_data
from opdctl.run.plan import ready
from opdctl.run.rundir import RunDir

FILES, RECIPES = (".jsonl", ".json", ".parquet"), (".yaml", ".yml")


def of_recipe(
    target: str, stage: str, overrides: tuple[str, ...]
) -> tuple[Recipe, list[str], RunDir | None]:
    """Recipe, stages and run directory of ``opdctl diagnose RECIPE|DIR``.

    Args:
        stage: one of them; empty is all that have teachers.

    Raises:
        UsageError: no such stage, or none whose models are there; says what is missing.
    """
    run = RunDir(target) if (Path(target) / "run.json").is_file() else None
    if run and run.is_set():
        hint = ", ".join(str(r.path) for r in run.runs()[:3])
        raise UsageError(f"{target} holds a run for each seed", f"one of them: {hint}")
    recipe = launch.read_recipe(run, overrides) if run else load(target, overrides=overrides)
    found = ready(recipe, run)
    now, later = ([s for s in part if recipe.stages[s].kind == "opd"] for part in found)
    if stage and stage not in recipe.stages:
        near = did_you_mean(stage, recipe.stages, "stages:")
        raise UsageError(f"--stage {stage}: no such stage", near)
    if not now and not later:
        hint = "of two models: opdctl diagnose --student REF --teacher REF"
        raise UsageError(f"no stage of {target} has teachers", hint)
    if stage and stage not in (*now, *later):
        raise UsageError(f"stage {stage} has no teachers", f"one of {', '.join((*now, *later))}")
    chosen = [s for s in now if s == (stage or s)]
    if not chosen:
        waiting = [s for s in later if s == (stage or s)]
        why = "; ".join(f"{s}: {found[1][s]}" for s in waiting)
        raise UsageError(
            f"no stage of {target} can be diagnosed yet: {why}",
            f"run what it needs first: {_first(target, run, recipe, waiting, overrides)}",
        )
    return recipe, chosen, run


def _first(
    target: str, run: RunDir | None, recipe: Recipe, stages: list[str], overrides: tuple[str, ...]
) -> str:
    """What to type so that the models of stages are there. A run is continued as a whole: what it
    has finished is not done again, and ``opdctl run`` would begin another."""
    if run:
        return shlex.join(("opdctl", "resume", target))
    used = [recipe.stages[s] for s in stages]
    texts = [text for c in used for text in (c.student, *(t.model for t in c.teachers.values()))]
    parsed = [references.parse(text) for text in texts]
    needed = dict.fromkeys(r.name for r in parsed if r.form == "stage")
    only = [word for name in needed for word in ("--only", name)]
    return f"{shlex.join(('opdctl', 'run', target, *only, *overrides))}; then diagnose its run"


def data_of(named: str, of_models: dict[str, dict]) -> dict[str, dict]:
    """The data entries that one ``--data`` means.

    Args:
        named: a file, a folder of a data set, a recipe, a run directory, a domain of the run that
            wrote one of the models, or a task of reasoning-gym.
        of_models: the data entries of that run.

    Raises:
        UsageError: none of these.
    """
    path = Path(named)
    if named in of_models:
        return {named: of_models[named]}
    if (path / "run.json").is_file():
        return launch.read_recipe(RunDir(path).runs()[0]).to_dict()["data"]
    if path.suffix in FILES or path.is_dir() or (path.is_file() and path.suffix not in RECIPES):
        name = re.sub(r"[^A-Za-z0-9-]", "_", path.stem).lstrip("_-") or "prompts"
        return {name: {"kind": "hf" if path.is_dir() else "jsonl", "path": str(path)}}
    if named in shipped() or path.suffix in RECIPES:
        return read_source(named).layer.tree.get("data", {})
    near = difflib.get_close_matches(named, of_models, n=1, cutoff=0.6)
    if near or not re.fullmatch(r"[a-z][a-z0-9_]*", named):
        known = [*of_models, *shipped()]
        near = did_you_mean(named, known, "a .jsonl file, a run directory, or one of")
        raise UsageError(f"--data {named}: no file, run, recipe, domain or task of that name", near)
    return {named: {"kind": "reasoning_gym", "task": named}}


def of_models(
    student: str, teachers: tuple[str, ...], data: tuple[str, ...], overrides: tuple[str, ...]
) -> tuple[Recipe, list[str], dict[str, dict[str, dict]]]:
    """An opd stage of a student and its teachers, what was filled in, and the data entries that
    each ``data`` meant.

    Args:
        data: see ``data_of``; empty is the data of the run that wrote one of the models.

    Raises:
        UsageError, RecipeError: it is not well formed.
    """
    tree, full, named, said = one_stage("opd", overrides, student, teachers, "")
    found = run_data([student, *(t.split("=", 1)[-1] for t in teachers)])
    meant = {one: data_of(one, found) for one in data}
    for entries in meant.values():
        tree["data"] = tree.get("data", {}) | entries
    if not data and "data" not in tree and not any(o.startswith("data.") for o in full):
        tree["data"] = {d: c for d, c in found.items() if d in named} or found
    said.append(f"prompts: {', '.join(tree.get('data', {})) or 'none'}")
    return resolve(tree, "opdctl diagnose", overrides=full), said, meant
