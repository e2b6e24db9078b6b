"""A recipe: one file that is the whole pipeline, read, resolved and checked.

Order of resolution: recipe, size overlay, overrides, matrix expansion, overrides of expanded
names, schema, graph. Every problem found on the way is collected and reported at once, with its
full path, its line and what to type instead. Nothing is loaded and nothing is written.

    opdctl validate recipes/mimo.yaml stages.mopd.optim.lr=1e-3
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from opdctl.config import references, registry
from opdctl.config.schema import build, did_you_mean, to_dict
from opdctl.config.schema import references as refs_of
from opdctl.config.settings import Runtime, StageConfig
from opdctl.config.shapes import Shape
from opdctl.errors import OpdctlError, Problem, RecipeError, UsageError
from opdctl.recipe import graph
from opdctl.recipe.own_members import use_members_of
from opdctl.recipe.resolution import (
    TOP,
    Where,
    assign_all,
    choose,
    expand,
    interpolate,
    overlay,
    split,
)
from opdctl.recipe.yaml_lines import LONGEST, parse

LONGEST_NAME = 100  # bytes


@dataclass
class Recipe:
    """A resolved recipe. Every configuration in it passed its schema."""

    name: str
    about: str = ""
    size: str = "tiny"
    seed: int = 0
    options: dict[str, bool] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, StageConfig] = field(default_factory=dict)
    claims: dict[str, Any] = field(default_factory=dict)
    runtime: Runtime = field(default_factory=Runtime)
    members: str = field(default="", metadata={"role": "operational"})  # its files are hashed

    def to_dict(self) -> dict:
        """What ``resolved.yaml`` holds; reading it back gives the same recipe."""
        content = to_dict(self)
        return content if self.members else {k: v for k, v in content.items() if k != "members"}

    def domains(self, stage: str) -> dict[str, float]:
        """``{domain: share}`` of a stage; shares sum to 1."""
        prompts = getattr(self.stages[stage], "prompts", None)
        shares = dict(getattr(prompts, "domains", {})) or dict.fromkeys(self.data, 1.0)
        total = sum(shares.values())
        return {d: s / total for d, s in shares.items() if s > 0} if total else {}

    def total(self, stage: str) -> int:
        """What a stage counts: steps, batches, or the domains it evaluates; a merge nothing."""
        config = self.stages[stage]
        evaluated = self.domains(stage) if hasattr(config, "prompts") else {}
        return getattr(config, "steps", 0) or getattr(config, "batches", 0) or len(evaluated)

    def notes(self) -> list[Problem]:
        """What is allowed and has less effect than it seems, or none."""
        found = graph.rounding(self, lost=False)
        engine = registry.member("engines", self.runtime.engine)
        found += engine.notes(self)
        for stage, config in self.stages.items():
            notes = registry.member("stages", config.kind).notes(config)
            found += [replace(n, path=f"stages.{stage}.{n.path}") for n in notes]
        return found

    def references(self, stage: str) -> list[tuple[str, str]]:
        """``(key, model reference)`` of all that a stage reads, its domains' judges included."""
        found = refs_of(self.stages[stage])
        if hasattr(self.stages[stage], "prompts"):
            for domain in self.domains(stage):
                verifier = self.data[domain].verifier
                found += refs_of(verifier, f"data.{domain}.verifier")
        return found

    def upstream(self, stage: str) -> list[str]:
        """Stages whose output this stage reads, without repetition."""
        names = [
            references.parse(text).name
            for _, text in self.references(stage)
            if references.parse(text).form == "stage"
        ]
        return list(dict.fromkeys(names))

    def order(self) -> list[str]:
        """Stages so that each comes after what it reads; ties in the recipe's order."""
        done: list[str] = []
        waiting = list(self.stages)
        while waiting:
            ready = [s for s in waiting if all(u in done for u in self.upstream(s))]
            assert ready, "cycles are refused when the recipe is read"
            done.append(ready[0])
            waiting.remove(ready[0])
        return done


def shipped() -> dict[str, Path]:
    """Recipes that come with opdctl, by name."""
    here = Path(str(resources.files("opdctl")))
    for folder in (here / "recipes", here.parent / "recipes"):
        if folder.is_dir():
            return {p.stem: p for p in sorted(folder.glob("*.yaml"))}
    return {}


def find(name: str) -> Path:
    """The file of a recipe: a path, or the name of a shipped one.

    Raises:
        UsageError: neither.
    """
    path = Path(name)
    if os.path.isfile(name):
        return path
    if name in shipped():
        return shipped()[name]
    near = did_you_mean(path.stem, shipped(), "shipped recipes:")
    raise UsageError(f"no recipe {name}", near)


def read(path: Path) -> str:
    """The text of a recipe file.

    Raises:
        UsageError: it cannot be read, is not UTF-8, or is too long for a recipe.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}", "a recipe is a text file, UTF-8") from None
    if len(text) > LONGEST:
        raise UsageError(f"{path} is longer than {LONGEST} characters", "is it a recipe?")
    return text


def load(
    name: str,
    *,
    size: str = "",
    seed: int | None = None,
    overrides: tuple[str, ...] = (),
    trusted: bool = False,
) -> Recipe:
    """Read and resolve a recipe file.

    Args:
        trusted: its own members may be imported: it is about to be run.

    Raises:
        UsageError: no such file, or not a mapping in YAML.
        RecipeError: everything that is wrong with it.
    """
    path = find(name)
    text = read(path)
    tree, lines, problems = parse(text, str(path))
    if seed is not None:
        overrides = (*overrides, f"seed={seed}")
    return resolve(
        tree,
        str(path),
        size=size,
        overrides=overrides,
        lines=lines,
        problems=problems,
        trusted=trusted,
    )


def resolve(
    tree: dict,
    label: str,
    *,
    size: str = "",
    overrides: tuple[str, ...] = (),
    lines: dict[str, int] | None = None,
    problems: list[Problem] | None = None,
    written: bool = False,
    trusted: bool = False,
) -> Recipe:
    """A recipe from a plain tree. See the module for the order.

    Args:
        written: it is a run's resolved recipe: its size is in it already, and the folders it names
            may be gone.
        trusted: its own members may be imported: it is about to be run.

    Raises:
        RecipeError: everything that is wrong with it.
    """
    problems = list(problems or [])
    where = Where(label, lines or {})
    pending = [split(text) for text in overrides]
    sizes = [value for parts, value, _ in pending if parts == ["size"]]
    if not written:
        tree = overlay(dict(tree), str(sizes[-1]) if sizes else size, problems)
    tree = assign_all(tree, pending, where, problems, expanded=False)
    tree = choose(interpolate(tree, problems), problems)
    tree = expand(tree, where, problems)
    tree = assign_all(tree, pending, where, problems, expanded=True)
    typed = any(parts == ["members"] for parts, _, _ in pending)
    wrong = use_members_of(tree, label, typed, trusted)
    if wrong:  # every member of its own would be called unknown too
        raise RecipeError([where.place(p) for p in (*problems, wrong)], label)
    recipe = _build(tree, problems)
    if recipe and not problems:
        problems += graph.check(recipe, folders=not written)
    if problems:
        raise RecipeError([where.place(p) for p in problems], label)
    return recipe


def lookup(family: str, name: str) -> type:
    """The Config of a member; what ``schema.build`` asks for."""
    cls = registry.member(family, name)
    if not hasattr(cls, "Config"):
        raise UsageError(f"{family}/{name} is chosen by opdctl itself", "it has no keys")
    return cls.Config


def _build(tree: dict, problems: list[Problem]) -> Recipe | None:
    for name in tree:
        if name not in TOP:
            problems.append(Problem(str(name), "unknown key", did_you_mean(str(name), TOP)))
    plain = {"name": str, "about": str, "size": str, "seed": int}
    values: dict[str, Any] = {}
    for name, kind in plain.items():
        value = tree.get(name, {"name": "recipe", "about": "", "size": "tiny", "seed": 0}[name])
        if not isinstance(value, kind) or isinstance(value, bool):
            problems.append(Problem(name, f"expected {kind.__name__}, got {value!r}"))
        values[name] = value
    name = str(values["name"])
    if not re.fullmatch(r"\w[\w.-]*", name) or len(name.encode()) > LONGEST_NAME:
        what = f"letters, digits, _ . - only, {LONGEST_NAME} at most: it names the run directory"
        problems.append(Problem("name", what))
    for part in ("options", "models", "shapes", "data", "stages", "claims", "runtime"):
        value = tree.get(part) or {}
        if not isinstance(value, dict):
            problems.append(Problem(part, f"expected a mapping, got {value!r}"))
            value = {}
        values[part] = value
    for alias, text in values["models"].items():
        if not isinstance(text, str):
            problems.append(Problem(f"models.{alias}", "expected a model reference"))
    values["shapes"] = {
        name: build(Shape, entry, f"shapes.{name}", problems, lookup)
        for name, entry in values["shapes"].items()
    }
    values["data"] = _kinds("data", values["data"], problems)
    values["stages"] = _kinds("stages", values["stages"], problems)
    if not values["stages"]:
        problems.append(Problem("stages", "a recipe has at least one stage"))
    built = {}
    for name, entry in values["claims"].items():
        try:
            built[name] = build(
                lookup("claims", str(name).lower()), entry or {}, f"claims.{name}", problems, lookup
            )
        except OpdctlError as error:
            problems.append(Problem(f"claims.{name}", "no such claim", error.hint))
    values["claims"] = built
    values["members"] = tree.get("members") or ""
    values["runtime"] = build(Runtime, values["runtime"], "runtime", problems, lookup)
    return None if problems else Recipe(**values)


def _kinds(family: str, entries: dict, problems: list[Problem]) -> dict:
    built = {}
    for name, entry in entries.items():
        path = f"{family}.{name}"
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name) or len(name.encode()) > LONGEST_NAME:
            what = f"a name has letters, digits, _ and - only, {LONGEST_NAME} at most"
            problems.append(Problem(path, what, "it is the name of a folder"))
            continue
        if not isinstance(entry, dict):
            problems.append(Problem(path, f"expected a mapping, got {entry!r}"))
            continue
        kind = entry.get("kind")
        if not isinstance(kind, str):
            known = registry.members(family)
            problems.append(Problem(path, "missing key 'kind'", f"one of {', '.join(known)}"))
            continue
        try:
            cls = lookup(family, kind)
        except OpdctlError as error:
            problems.append(Problem(f"{path}.kind", error.message, error.hint))
            continue
        built[name] = build(cls, entry, path, problems, lookup)
    return built
