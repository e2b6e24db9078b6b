"""The making of run directories: a new one, one opened again, one that reuses another's stages.

No stage is run here.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from opdctl import __version__
from opdctl.config.files import read_text
from opdctl.config.schema import role_of
from opdctl.errors import UsageError
from opdctl.recipe.recipe import Recipe, resolve
from opdctl.recipe.source import Source
from opdctl.recipe.yaml_lines import dump, parse
from opdctl.run.fingerprint import differences, fingerprints, semantic
from opdctl.run.new_directory import new_directory
from opdctl.run.plan import Planned, plan
from opdctl.run.rundir import RunDir, write_json, write_text

MOST_SEEDS = 1000


def new_run(recipe: Recipe, source: Source | str, path: Path, only: tuple[str, ...] = ()) -> RunDir:
    """Create a run directory for a recipe.

    Args:
        source: the recipe as written, kept beside the resolved one: its text, or its files.
        only: the stages it was made for, if not for all.

    Raises:
        UsageError: the directory exists, or cannot be written.
    """
    text, digests = (source, {}) if isinstance(source, str) else (source.text, source.digests)
    with new_directory(path, recipe.runtime.shared) as run:
        write_text(run / "recipe.yaml", text)
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
                "only": list(only),
                "created": time.time(),
                "command": sys.argv,
                "files": digests,
                "fingerprints": fingerprints(recipe),
            },
        )
    return RunDir(path)


def new_set(
    recipes: list[Recipe], source: Source | str, path: Path, only: tuple[str, ...] = ()
) -> RunDir:
    """Create a directory with one run per recipe, which differ in their seeds."""
    with new_directory(path, recipes[0].runtime.shared) as parent:
        for recipe in recipes:
            new_run(recipe, source, parent / f"seed-{recipe.seed}", only)
        write_json(
            parent / "run.json",
            {
                "opdctl": __version__,
                "recipe": recipes[0].name,
                "size": recipes[0].size,
                "seeds": [recipe.seed for recipe in recipes],
                "created": time.time(),
                "command": sys.argv,
            },
        )
    return RunDir(path)


def parse_seeds(text: str) -> list[int]:
    """Return the seeds that a text lists: ``0..2`` or ``0,3,4``.

    Raises:
        UsageError: it is neither.
    """
    try:
        if ".." in text:
            first, last = map(int, text.split(".."))
            seeds = list(range(first, min(last, first + MOST_SEEDS) + 1))
        else:
            seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UsageError(f"--seeds {text!r:.80} names no seeds", "--seeds 0..2 or --seeds 0,3,4")
    if len(seeds) > MOST_SEEDS:
        raise UsageError(f"--seeds {text!r:.80}: more than {MOST_SEEDS}", "--seeds 0..2")
    return seeds


def read_recipe(run: RunDir, overrides: tuple[str, ...] = (), *, trusted: bool = False) -> Recipe:
    """Read the resolved recipe of a run, with overrides.

    Args:
        trusted: its own members may be imported: it is about to be run.

    Raises:
        UsageError: not a run directory, or its recipe cannot be read.
        RecipeError: the overrides break it.
    """
    run.manifest()
    path = run / "resolved.yaml"
    try:
        tree, lines, problems = parse(read_text(path), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    return resolve(
        tree,
        str(path),
        size=str(tree.get("size", "")),
        overrides=overrides,
        lines=lines,
        problems=problems,
        written=True,
        trusted=trusted,
    )


def reopen(run: RunDir, overrides: tuple[str, ...] = ()) -> tuple[Recipe, list[str]]:
    """Return the recipe to continue a run with, and what changed about how it is carried out.

    Nothing is written: the caller does that, once it holds the run's lock.

    Raises:
        UsageError: a change that would give other results; names each key and the way out.
    """
    old = read_recipe(run, trusted=True)
    new = read_recipe(run, overrides, trusted=True)
    changed = []
    for stage in old.stages:
        try:
            text = read_text(run.stage(stage) / "config.yaml")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {run.stage(stage) / 'config.yaml'}: {error}") from None
        edited = differences(parse(text, "config.yaml")[0], semantic(old, stage))
        changed += [f"stages.{stage} (edited in resolved.yaml): {line}" for line in edited]
    notes = []
    for line in differences(old.to_dict(), new.to_dict()):
        role = role_of(new, line.split(":")[0])
        if role == "semantic":
            changed.append(line)
        else:
            notes.append(line + (" (equal up to rounding)" if role == "numeric" else ""))
    if changed:
        listed = "\n".join(f"  - {line}" for line in dict.fromkeys(changed))
        raise UsageError(
            f"resume keeps results as they were; this would change the recipe:\n{listed}",
            f"opdctl run RECIPE --from {run.path} key=value    "
            "starts a new run that reuses the stages that stay the same",
        )
    return new, notes


def reuse(
    run: RunDir, recipe: Recipe, old: RunDir, planned: list[Planned] | None = None
) -> tuple[list[str], list[str]]:
    """Copy the stages of another run that the plan skips: finished, and of what is there now.

    Args:
        planned: ``plan(recipe, old, reuse=True)``, where the caller has it: it hashes files.

    Returns:
        Their names; and those of finished stages with the same fingerprint that are made again
        because files under their paths have changed.

    Raises:
        UsageError: the other is not a run directory.
    """
    reused: list[str] = []
    changed: list[str] = []
    for entry in planned or plan(recipe, old, reuse=True):
        stage, record = entry.name, old.record(entry.name)
        if entry.action != "skip":
            if record.get("status") == "done" and record.get("fingerprint") == entry.fingerprint:
                changed.append(stage)
            continue
        part = run.stage(stage).with_name(f".{stage}.part")
        shutil.rmtree(part, ignore_errors=True)
        last = shutil.ignore_patterns(".lock", "stage.json")
        shutil.copytree(old.stage(stage), part, ignore=last)
        shutil.rmtree(run.stage(stage), ignore_errors=True)
        part.rename(run.stage(stage))
        write_json(run.stage(stage) / "stage.json", {**record, "reused_from": str(old.path)})
        reused.append(stage)
    return reused, changed


def new_attempt(run: RunDir) -> Path:
    """Create a log for this attempt and let ``logs/latest`` point at it."""
    folder = run / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [p.stem[8:] for p in folder.glob("attempt-*.log")]
    number = 1 + max((int(n) for n in numbers if n.isdigit()), default=0)
    log = folder / f"attempt-{number:03d}.log"
    log.touch()
    link = folder / f".latest.{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(log.name)
    link.rename(folder / "latest")
    return log
