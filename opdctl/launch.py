"""Make a run directory, open one again, reuse one's finished stages. No stage is run here."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from opdctl import __version__, rundir
from opdctl.errors import UsageError
from opdctl.plan import differences, fingerprints, semantic
from opdctl.positions import dump, parse
from opdctl.recipe import Recipe, resolve
from opdctl.rundir import RunDir, write_json, write_text


def new_run(recipe: Recipe, source: str, path: Path) -> RunDir:
    """Create a run directory for a recipe.

    Args:
        source: text of the recipe file, kept beside the resolved one.

    Raises:
        UsageError: the directory exists, or cannot be written.
    """
    run = rundir.create(path)
    write_text(run / "recipe.yaml", source)
    write_text(run / "resolved.yaml", dump(recipe.to_dict()))
    for stage in recipe.stages:
        write_text(run.stage(stage) / "config.yaml", dump(semantic(recipe, stage)))
    write_json(
        run / "run.json",
        {
            "opdctl": __version__,
            "recipe": recipe.name,
            "size": recipe.size,
            "seed": recipe.seed,
            "created": time.time(),
            "command": sys.argv,
            "fingerprints": fingerprints(recipe),
        },
    )
    return run


def new_set(recipe: Recipe, seeds: list[int], path: Path) -> RunDir:
    """A directory for one run per seed."""
    run = rundir.create(path)
    write_json(
        run / "run.json",
        {
            "opdctl": __version__,
            "recipe": recipe.name,
            "size": recipe.size,
            "seeds": seeds,
            "created": time.time(),
            "command": sys.argv,
        },
    )
    return run


def parse_seeds(text: str) -> list[int]:
    """``0..2`` or ``0,3,4``.

    Raises:
        UsageError: neither.
    """
    try:
        if ".." in text:
            first, last = map(int, text.split(".."))
            seeds = list(range(first, last + 1))
        else:
            seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UsageError(f"--seeds {text!r} names no seeds", "--seeds 0..2 or --seeds 0,3,4")
    return seeds


def read_recipe(run: RunDir, overrides: tuple[str, ...] = ()) -> Recipe:
    """The resolved recipe of a run, with overrides.

    Raises:
        UsageError: not a run directory, or its recipe cannot be read.
        RecipeError: the overrides break it.
    """
    run.manifest()
    path = run / "resolved.yaml"
    try:
        tree, lines, problems = parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    return resolve(
        tree,
        str(path),
        size=str(tree.get("size", "")),
        overrides=overrides,
        lines=lines,
        problems=problems,
        folders=False,
    )


def reopen(run: RunDir, overrides: tuple[str, ...] = ()) -> tuple[Recipe, list[str]]:
    """The recipe to continue a run with, and what was changed about how it is carried out.

    Raises:
        UsageError: a change that would give other results; names each key and the way out.
    """
    old = read_recipe(run)
    new = read_recipe(run, overrides)
    changed = []
    for stage in dict.fromkeys([*old.stages, *new.stages]):
        if stage not in old.stages or stage not in new.stages:
            changed.append(f"stages.{stage}")
            continue
        recorded, _, _ = parse((run.stage(stage) / "config.yaml").read_text(), "config.yaml")
        changed += [f"{stage}: {line}" for line in differences(recorded, semantic(new, stage))]
    if changed:
        listed = "\n".join(f"  - {line}" for line in dict.fromkeys(changed))
        raise UsageError(
            f"resume keeps results as they were; this would change them:\n{listed}",
            f"opdctl run RECIPE --from {run.path} key=value    "
            "starts a new run that reuses the stages that stay the same",
        )
    notes = differences(old.to_dict()["runtime"], new.to_dict()["runtime"])
    if notes:
        write_text(run / "resolved.yaml", dump(new.to_dict()))
    return new, notes


def reuse(run: RunDir, recipe: Recipe, old: RunDir) -> list[str]:
    """Copy the finished stages of another run whose fingerprints match. Returns their names.

    Raises:
        UsageError: the other is not a run directory.
    """
    old.manifest()
    prints = fingerprints(recipe)
    reused = []
    for stage in recipe.order():
        record = old.record(stage)
        if record.get("status") != "done" or record.get("fingerprint") != prints[stage]:
            continue
        part = run.stage(stage).with_name(f".{stage}.part")
        shutil.rmtree(part, ignore_errors=True)
        last = shutil.ignore_patterns(".lock", "stage.json")
        shutil.copytree(old.stage(stage), part, ignore=last)
        shutil.rmtree(run.stage(stage), ignore_errors=True)
        part.rename(run.stage(stage))
        write_json(run.stage(stage) / "stage.json", {**record, "reused_from": str(old.path)})
        reused.append(stage)
    return reused


def new_attempt(run: RunDir) -> Path:
    """A log for this attempt; ``logs/latest`` points at it."""
    folder = run / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(p.stem[8:]) for p in folder.glob("attempt-*.log")), default=0)
    log = folder / f"attempt-{number:03d}.log"
    log.touch()
    link = folder / f".latest.{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(log.name)
    link.rename(folder / "latest")
    return log
