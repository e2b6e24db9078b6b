"""The recipe that ``opdctl diagnose`` works on.

Either one opd stage is built from the models on the command line, or stages are chosen from a
recipe or a run: those whose models exist.
"""

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


def from_recipe(
    target: str, stage: str, overrides: tuple[str, ...]
) -> tuple[Recipe, list[str], RunDir | None]:
    """Return the recipe, stages and run directory of ``opdctl diagnose RECIPE|DIR``.

    Args:
        stage: one of its stages; empty for all that have teachers.

    Raises:
        UsageError: no such stage, or none whose models exist; the message says what is missing.
    """
    run = RunDir(target) if (Path(target) / "run.json").is_file() else None
    if run and run.is_set():
        hint = ", ".join(str(r.path) for r in run.runs()[:3])
        raise UsageError(f"{target} holds a run for each seed", f"one of them: {hint}")
    recipe = launch.read_recipe(run, overrides) if run else load(target, overrides=overrides)
    stages = ready(recipe, run)
    here, later = ([s for s in part if recipe.stages[s].kind == "opd"] for part in stages)
    if stage and stage not in recipe.stages:
        near = did_you_mean(stage, recipe.stages, "stages:")
        raise UsageError(f"--stage {stage}: no such stage", near)
    if not here and not later:
        hint = "of two models: opdctl diagnose --student REF --teacher REF"
        raise UsageError(f"no stage of {target} has teachers", hint)
    if stage and stage not in (*here, *later):
        raise UsageError(f"stage {stage} has no teachers", f"one of {', '.join((*here, *later))}")
    chosen = [s for s in here if s == (stage or s)]
    if not chosen:
        waiting = [s for s in later if s == (stage or s)]
        command = _command_for_missing(target, run, recipe, waiting, overrides)
        why = "; ".join(f"{s}: {stages[1][s]}" for s in waiting)
        raise UsageError(
            f"no stage of {target} can be diagnosed yet: {why}",
            f"run what it needs first: {command}",
        )
    return recipe, chosen, run


def _command_for_missing(
    target: str, run: RunDir | None, recipe: Recipe, stages: list[str], overrides: tuple[str, ...]
) -> str:
    """Return the command that makes the missing models of stages.

    A run is resumed as a whole: its finished stages are not repeated, while ``opdctl run`` would
    begin another run.
    """
    if run:
        return shlex.join(("opdctl", "resume", target))
    configs = [recipe.stages[s] for s in stages]
    texts = [text for c in configs for text in (c.student, *(t.model for t in c.teachers.values()))]
    parsed = [references.parse(text) for text in texts]
    needed = dict.fromkeys(r.name for r in parsed if r.form == "stage")
    only = [word for name in needed for word in ("--only", name)]
    return f"{shlex.join(('opdctl', 'run', target, *only, *overrides))}; then diagnose its run"


def data_entries(word: str, run_entries: dict[str, dict]) -> dict[str, dict]:
    """Return the data entries that one ``--data`` means.

    Args:
        word: a file, a folder of a data set, a recipe, a run directory, a domain of the run that
            wrote one of the models, or a task of reasoning-gym.
        run_entries: the data entries of that run.

    Raises:
        UsageError: it is none of these.
    """
    path = Path(word)
    if word in run_entries:
        return {word: run_entries[word]}
    if (path / "run.json").is_file():
        return launch.read_recipe(RunDir(path).runs()[0]).to_dict()["data"]
    if path.suffix in FILES or path.is_dir() or (path.is_file() and path.suffix not in RECIPES):
        name = re.sub(r"[^A-Za-z0-9-]", "_", path.stem).lstrip("_-") or "prompts"
        return {name: {"kind": "hf" if path.is_dir() else "jsonl", "path": str(path)}}
    if word in shipped() or path.suffix in RECIPES:
        return read_source(word).layer.tree.get("data", {})
    near = difflib.get_close_matches(word, run_entries, n=1, cutoff=0.6)
    if near or not re.fullmatch(r"[a-z][a-z0-9_]*", word):
        known = [*run_entries, *shipped()]
        near = did_you_mean(word, known, "a .jsonl file, a run directory, or one of")
        raise UsageError(f"--data {word}: no file, run, recipe, domain or task of that name", near)
    return {word: {"kind": "reasoning_gym", "task": word}}


def from_models(
    student: str, teachers: tuple[str, ...], data: tuple[str, ...], overrides: tuple[str, ...]
) -> tuple[Recipe, list[str], dict[str, dict[str, dict]]]:
    """Build a recipe with one opd stage of a student and its teachers.

    Args:
        data: words as for ``data_entries``; empty for the data of the run that wrote one of the
            models.

    Returns:
        The recipe; a line for each default that was filled in; the data entries of each word.

    Raises:
        UsageError, RecipeError: it is not well formed.
    """
    tree, full, named, notes = one_stage("opd", overrides, student, teachers, "")
    run_entries = run_data([student, *(t.split("=", 1)[-1] for t in teachers)])
    entries_of = {word: data_entries(word, run_entries) for word in data}
    for entries in entries_of.values():
        tree["data"] = tree.get("data", {}) | entries
    if not data and "data" not in tree and not any(o.startswith("data.") for o in full):
        tree["data"] = {d: c for d, c in run_entries.items() if d in named} or run_entries
    notes.append(f"prompts: {', '.join(tree.get('data', {})) or 'none'}")
    return resolve(tree, "opdctl diagnose", overrides=full), notes, entries_of
