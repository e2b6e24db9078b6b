"""A recipe: one file that is the whole pipeline, read, resolved and checked.

Order of resolution: recipe on its base, size overlay (kinds, then named stages), overrides, matrix
expansion, overrides of expanded names, schema, graph. Every problem met on the way is collected and
reported at once, with its full path, its line and what to type instead. Nothing is loaded and
nothing is written.

    opdctl validate recipes/mimo.yaml stages.mopd.optim.lr=1e-3
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

from opdctl.config import references, registry
from opdctl.config.schema import build, did_you_mean, to_dict
from opdctl.config.schema import references as refs_of
from opdctl.config.secrets import credentials_in
from opdctl.config.settings import Runtime, StageConfig
from opdctl.config.shapes import Shape
from opdctl.errors import Note, OpdctlError, Problem, RecipeError, UsageError
from opdctl.recipe import graph
from opdctl.recipe.layers import Layer
from opdctl.recipe.own_members import use_members_of
from opdctl.recipe.resolution import (
    TOP,
    Where,
    assign_all,
    choose,
    expand,
    interpolate,
    require_distinct,
    split,
)
from opdctl.recipe.sizes import lay_size
from opdctl.recipe.source import read_source

LONGEST_NAME = 100  # characters
LARGEST_SEED = 2**63


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
    renamed: list[Note] = field(default_factory=list)  # keys that were written by their old names

    def to_dict(self) -> dict:
        """Return the content of ``resolved.yaml``; reading it back gives the same recipe."""
        content = to_dict(replace(self, renamed=[]))
        left_out = ("renamed",) if self.members else ("renamed", "members")
        return {k: v for k, v in content.items() if k not in left_out}

    def domains(self, stage: str) -> dict[str, float]:
        """Return ``{domain: share}`` of a stage; shares sum to 1."""
        prompts = self.stages[stage].prompts
        shares = dict(prompts.domains if prompts else {}) or dict.fromkeys(self.data, 1.0)
        total = sum(shares.values())
        return {d: s / total for d, s in shares.items() if s > 0} if total else {}

    def total(self, stage: str) -> int:
        """Return a stage's steps, its batches, or its evaluated domains; 0 for a merge."""
        config = self.stages[stage]
        return config.steps or config.batches or len(self.domains(stage) if config.prompts else {})

    def notes(self) -> list[Problem]:
        """Return the settings that are allowed and have less effect than it seems, or none."""
        problems = self.renamed + graph.rounding(self, lost=False)
        engine = registry.member("engines", self.runtime.engine)
        problems += engine.notes(self)
        for stage, config in self.stages.items():
            notes = registry.member("stages", config.kind).notes(config)
            problems += [replace(n, path=f"stages.{stage}.{n.path}") for n in notes]
        return problems

    def references(self, stage: str) -> list[tuple[str, str]]:
        """Return ``(key, model reference)`` of all models a stage reads, its judges included."""
        pairs = refs_of(self.stages[stage])
        if self.stages[stage].prompts:
            for domain in self.domains(stage):
                verifier = self.data[domain].verifier
                pairs += refs_of(verifier, f"data.{domain}.verifier")
        return pairs

    def upstream(self, stage: str) -> list[str]:
        """Return the stages whose output this stage reads, without repetition."""
        names = [
            references.parse(text).name
            for _, text in self.references(stage)
            if references.parse(text).form == "stage"
        ]
        return list(dict.fromkeys(names))

    def order(self) -> list[str]:
        """Return the stages, each after those it reads; ties in the recipe's order."""
        done: list[str] = []
        waiting = list(self.stages)
        while waiting:
            ready = [s for s in waiting if all(u in done for u in self.upstream(s))]
            assert ready, "cycles are refused when the recipe is read"
            done.append(ready[0])
            waiting.remove(ready[0])
        return done


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
    source = read_source(name)
    if seed is not None:
        overrides = (*overrides, f"seed={seed}")
    return resolve(
        source.layer.tree,
        next(iter(source.files)),
        size=size,
        overrides=overrides,
        lines=source.layer.lines,
        problems=source.problems,
        trusted=trusted,
    )


def resolve(
    tree: dict,
    label: str,
    *,
    size: str = "",
    overrides: tuple[str, ...] = (),
    lines: dict[str, str] | None = None,
    problems: list[Problem] | None = None,
    written: bool = False,
    trusted: bool = False,
) -> Recipe:
    """Resolve a recipe from a plain tree. See the module for the order.

    Args:
        written: it is a run's resolved recipe: its size is in it already, and the folders it names
            may be gone.
        trusted: its own members may be imported: it is about to be run.

    Raises:
        RecipeError: everything that is wrong with it.
    """
    problems = list(problems or [])
    pending = [split(text) for text in overrides]
    problems += require_distinct(pending, tree.get("options"))
    sizes = [value for parts, value, _ in pending if parts == ["size"]]
    layer = Layer(dict(tree), lines or {})
    if not written:
        layer = lay_size(layer, str(sizes[-1]) if sizes else size, problems)
    where = Where(layer.lines)
    tree = assign_all(layer.tree, pending, where, problems, expanded=False)
    tree = choose(interpolate(tree, problems), problems)
    tree = expand(tree, where, problems)
    tree = assign_all(tree, pending, where, problems, expanded=True)
    leaks = list(credentials_in(tree))
    if leaks:  # before anything else could repeat one in a message
        raise RecipeError([where.place(p) for p in leaks], label)
    typed = any(parts == ["members"] for parts, _, _ in pending)
    wrong = use_members_of(tree, label, typed, trusted)
    if wrong:  # every member of its own would be called unknown too
        raise RecipeError([where.place(p) for p in (*problems, wrong)], label)
    recipe = _build(tree, problems)
    problems = [p for p in problems if not isinstance(p, Note)]
    if recipe and not problems:
        problems += graph.check(recipe, folders=not written)
    if problems:
        raise RecipeError([where.place(p) for p in problems], label)
    assert recipe is not None, "what cannot be built has a problem"
    if written:
        recipe.renamed = []  # it was the program that wrote them
    return recipe


def lookup(family: str, name: str) -> type:
    """Return the Config of a member, for ``schema.build``.

    Raises:
        UsageError: no such member, or it has no keys.
    """
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
    if isinstance(values["seed"], int) and not 0 <= values["seed"] < LARGEST_SEED:
        message = f"expected a whole number from 0 to 2**63 - 1, got {values['seed']}"
        problems.append(Problem("seed", message))
    name = str(values["name"])
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII) or len(name.encode()) > LONGEST_NAME:
        message = f"letters, digits, _ . - only, {LONGEST_NAME} at most: it names the run directory"
        problems.append(Problem("name", message))
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
    notes = [p for p in problems if isinstance(p, Note)]
    return Recipe(**values, renamed=notes) if len(notes) == len(problems) else None


def _kinds(family: str, entries: dict, problems: list[Problem]) -> dict:
    built = {}
    folders: dict[str, str] = {}
    for name, entry in entries.items():
        path = f"{family}.{name}"
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name, re.ASCII) or len(name) > LONGEST_NAME:
            message = f"a name has letters a-z, digits, _ and - only, {LONGEST_NAME} at most"
            problems.append(Problem(path, message, "it is the name of a folder"))
            continue
        twin = folders.setdefault(name.lower(), name)
        if twin != name:
            message = f"differs from {family}.{twin} by case only"
            problems.append(Problem(path, message, "some disks hold one folder for both"))
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
