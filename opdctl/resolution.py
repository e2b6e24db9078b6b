"""From a recipe's tree to the tree of one run: size overlay, overrides, interpolation, matrix.

sizes:   {small: {...}}                   laid over everything else; null removes an entry,
                                          an entry with a kind replaces the one of its name
a.b=c                                     overrides, before and after the matrix is expanded
when:    baselines                        a stage or claim that is there if that option is true;
                                          baselines=true is short for options.baselines=true
matrix:  {domain: [math, code]}           one stage entry into many: rl_{domain}
"""

from __future__ import annotations

import itertools
import re
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opdctl.errors import Problem, UsageError
from opdctl.positions import parse_value
from opdctl.schema import did_you_mean

TOP = {
    "name": "the recipe's name, used in the run directory",
    "about": "one line on what it reproduces",
    "size": "tiny, small or lab",
    "sizes": "size: an overlay on everything else",
    "seed": "seed of the run",
    "options": "name: true or false; decides on what says when: name",
    "models": "alias: model reference",
    "data": "domain: where its prompts and its verifier come from",
    "stages": "name: a stage",
    "claims": "claim: the roles its models play",
    "runtime": "threads, jobs, device: how it is carried out",
}


class Where:
    """Knows the line, or the override, that a dotted key came from."""

    def __init__(self, label: str, lines: dict[str, int]) -> None:
        self.label, self.lines = label, lines
        self.overrides: dict[str, str] = {}
        self.templates: dict[str, str] = {}

    def place(self, problem: Problem) -> Problem:
        if problem.where:
            return problem
        path = problem.path
        parts = path.split(".")
        if len(parts) > 1 and parts[0] == "stages" and parts[1] in self.templates:
            parts[1] = self.templates[parts[1]]
        for i in range(len(parts), 0, -1):
            prefix = ".".join(parts[:i])
            if prefix in self.overrides:
                return Problem(path, problem.message, problem.hint, self.overrides[prefix])
            if prefix in self.lines:
                at = f"{self.label}:{self.lines[prefix]}"
                return Problem(path, problem.message, problem.hint, at)
        return problem


def overlay(tree: dict, size: str, problems: list[Problem]) -> dict:
    sizes = tree.pop("sizes", None) or {}
    size = size or str(tree.get("size") or "tiny")
    if not isinstance(sizes, dict):
        problems.append(Problem("sizes", "expected a mapping"))
        return tree
    if size not in sizes and size != "tiny":
        known = list(dict.fromkeys(["tiny", *sizes]))
        problems.append(Problem("size", f"no size {size!r}", did_you_mean(size, known, "sizes:")))
    elif sizes.get(size):
        for part in ("data", "stages"):
            entries = sizes[size].get(part) if isinstance(sizes[size], dict) else None
            if isinstance(entries, dict) and isinstance(tree.get(part), dict):
                kinds = {k for k, v in entries.items() if isinstance(v, dict) and "kind" in v}
                tree[part] = {k: v for k, v in tree[part].items() if k not in kinds}
        try:
            tree = OmegaConf.to_container(OmegaConf.merge(tree, sizes[size]), resolve=False)
        except (
            OmegaConfBaseException,
            TypeError,
            ValueError,
        ) as error:  # a list over a mapping, say
            problems.append(Problem(f"sizes.{size}", str(error).split("\n")[0]))
    tree["size"] = size
    for part in ("stages", "data", "claims", "models"):
        if isinstance(tree.get(part), dict):
            tree[part] = {k: v for k, v in tree[part].items() if v is not None}
    return tree


def split(text: str) -> tuple[list[str], Any, str]:
    if "=" not in text:
        raise UsageError(f"{text!r} is not an override", "write key=value, with dots: a.b=1")
    path, value = text.split("=", 1)
    parts = path.strip().split(".")
    if not all(parts):
        raise UsageError(f"{text!r} is not an override", "write key=value, with dots: a.b=1")
    return parts, parse_value(value), text


def assign_all(tree, pending, where, problems, *, expanded: bool) -> dict:
    options = tree.get("options")
    options = options if isinstance(options, dict) else {}
    for parts, value, text in pending:
        if len(parts) == 1 and parts[0] in options and parts[0] not in TOP:
            parts = ["options", *parts]
        of_expanded = len(parts) > 1 and parts[0] == "stages" and parts[1] in where.templates
        unknown_yet = (
            len(parts) > 2
            and parts[0] == "stages"
            and isinstance(tree.get("stages"), dict)
            and parts[1] not in tree["stages"]
        )
        if expanded != (of_expanded or (expanded and unknown_yet)):
            continue
        if unknown_yet and (not expanded or parts[1] in where.templates.values()):
            continue
        path = ".".join(parts)
        where.overrides[path] = f"override {text!r}"
        if unknown_yet:
            hint = did_you_mean(parts[1], tree["stages"], "stages:")
            problems.append(Problem(path, f"no stage {parts[1]!r}", hint))
            continue
        if parts[0] not in TOP or parts[0] == "sizes":
            near = did_you_mean(parts[0], [*TOP, *options])
            problems.append(Problem(path, "unknown key", near))
            continue
        node = tree
        for i, part in enumerate(parts[:-1]):
            below = node.get(part)
            if below is None:
                below = node[part] = {}
            if (
                isinstance(below, str)
                and i == len(parts) - 2
                and parts[-3:-2] in (["teachers"], ["models"])
            ):
                below = node[part] = {"model": below}
            if not isinstance(below, dict):
                problems.append(Problem(path, f"{'.'.join(parts[: i + 1])} is not a mapping"))
                break
            node = below
        else:
            if value is None and len(parts) == 2 and parts[0] in ("stages", "data", "claims"):
                node.pop(parts[-1], None)
            else:
                node[parts[-1]] = value
    return tree


def choose(tree: dict, problems: list[Problem]) -> dict:
    """Leave out the stages and claims whose ``when`` names an option that is not true."""
    options = tree.get("options")
    options = options if isinstance(options, dict) else {}
    for name, value in options.items():
        if not isinstance(value, bool):
            problems.append(Problem(f"options.{name}", f"expected true or false, got {value!r}"))
    for part in ("stages", "claims"):
        if not isinstance(tree.get(part), dict):
            continue
        kept = {}
        for name, entry in tree[part].items():
            if isinstance(entry, dict) and "when" in entry:
                option = str(entry["when"])
                if option not in options:
                    near = did_you_mean(option, options, "options:")
                    path = f"{part}.{name}.when"
                    problems.append(Problem(path, f"no option {option!r}", near))
                if options.get(option) is not True:
                    continue
                entry = {k: v for k, v in entry.items() if k != "when"}
            kept[name] = entry
        tree = {**tree, part: kept}
    return tree


def interpolate(tree: dict, problems: list[Problem]) -> dict:
    if not _has_interpolation(tree):
        return tree
    try:
        return OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        message = str(error).split("\n")[0]
        problems.append(Problem(getattr(error, "full_key", "") or "", message))
        return tree


def _has_interpolation(tree: Any) -> bool:
    if isinstance(tree, dict):
        return any(_has_interpolation(v) for v in tree.values())
    if isinstance(tree, list):
        return any(map(_has_interpolation, tree))
    return isinstance(tree, str) and "${" in tree


def expand(tree: dict, where: Where, problems: list[Problem]) -> dict:
    """Replace each stage that has a ``matrix`` by one stage per combination of its axes."""
    stages = tree.get("stages")
    if not isinstance(stages, dict):
        return tree
    out: dict[str, Any] = {}
    for name, entry in stages.items():
        if not (isinstance(entry, dict) and "matrix" in entry):
            if name in out:
                problems.append(Problem(f"stages.{name}", "a matrix expands to this name too"))
            out[name] = entry
            continue
        axes = entry["matrix"]
        good = (
            isinstance(axes, dict)
            and axes
            and all(isinstance(v, list) and v for v in axes.values())
        )
        missing = [a for a in axes if f"{{{a}}}" not in name] if good else []
        if not good or missing:
            message = "expected axis: [values]"
            if missing:
                message = f"the stage's name lacks {{{missing[0]}}}"
            problems.append(Problem(f"stages.{name}.matrix", message, "matrix: {domain: [a, b]}"))
            continue
        body = {k: v for k, v in entry.items() if k != "matrix"}
        for combination in itertools.product(*axes.values()):
            values = dict(zip(axes, map(str, combination), strict=True))
            expanded = _fill(name, values)
            if expanded in out:
                problems.append(Problem(f"stages.{name}", f"expands to {expanded!r} twice"))
            where.templates[expanded] = name
            out[expanded] = _fill(body, values)
    return {**tree, "stages": out}


def _fill(tree: Any, values: dict[str, str]) -> Any:
    if isinstance(tree, str):
        return re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), tree)
    if isinstance(tree, dict):
        return {_fill(k, values): _fill(v, values) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_fill(v, values) for v in tree]
    return tree
