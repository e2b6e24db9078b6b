"""The way from a recipe's tree to that of one run: overrides, options, interpolation, matrix.

a.b=c                                     overrides, before and after the matrix is expanded
when:    baselines                        a stage or claim that is there if that option is true;
                                          baselines=true is short for options.baselines=true
matrix:  {domain: [math, code]}           one entry into many: a stage rl_{domain}, a domain, a
                                          teacher; {effort: {high: {tokens: 8}}} gives each value
                                          keys of its own: {effort} is high, {effort.tokens} is 8
${a.b}                            the value of another key of the recipe, alone or inside a text

OmegaConf resolves, after it is known that nothing outside the recipe is named (no
environment variable, no resolver) and that what ${...} and matrices unfold to is bounded.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opdctl.config.schema import did_you_mean
from opdctl.config.secrets import masked
from opdctl.errors import Problem, RecipeError, UsageError
from opdctl.recipe.yaml_lines import DEEPEST, parse_value

TOP = {
    "name": "the recipe's name, used in the run directory",
    "about": "one line on what it reproduces",
    "size": "tiny, small or lab",
    "sizes": "size: an overlay on everything else",
    "seed": "seed of the run",
    "options": "name: true or false; decides on what says when: name",
    "models": "alias: model reference",
    "shapes": "public name or folder: its size, for what plan estimates",
    "data": "domain: where its prompts and its verifier come from",
    "stages": "name: a stage",
    "claims": "claim: the roles its models play",
    "runtime": "threads, jobs, device: how it is carried out",
    "members": "folder of members of one's own: FAMILY/NAME.py",
}


LARGEST = 2_000_000  # characters and entries of a recipe once ${...} and matrices are unfolded
UNFOLDED = 100_000  # of what one ${...} stands for
MOST = 1000  # entries that one matrix expands to
REFERENCE = re.compile(r"\$\{([^${}]*)\}")


class Where:
    """The line, or the override, that each dotted key came from."""

    def __init__(self, lines: dict[str, str]) -> None:
        self.lines = lines
        self.overrides: dict[str, str] = {}
        self.templates: dict[str, str] = {}
        self.later: set[str] = set()
        self.size = 0

    def place(self, problem: Problem) -> Problem:
        """Return a problem with the place it came from, as far as that is known."""
        if problem.where:
            return problem
        path = problem.path
        parts = path.split(".")
        entry = ".".join(parts[:2])
        if entry in self.templates:
            parts[:2] = self.templates[entry].split(".", 1)
        for i in range(len(parts), 0, -1):
            prefix = ".".join(parts[:i])
            if prefix in self.overrides:
                return Problem(path, problem.message, problem.hint, self.overrides[prefix])
            if prefix in self.lines:
                return Problem(path, problem.message, problem.hint, self.lines[prefix])
        return problem


def split(text: str) -> tuple[list[str], Any, str]:
    """Return the parts of an override's key, its value, and its text.

    Raises:
        UsageError: it is not ``key=value``.
    """
    if "=" not in text:
        raise UsageError(f"{text!r:.80} is not an override", "write key=value, with dots: a.b=1")
    path, value = text.split("=", 1)
    parts = path.strip().split(".")
    if not all(parts) or len(parts) > DEEPEST or not path.isprintable():
        raise UsageError(f"{text!r:.80} is not an override", "write key=value, with dots: a.b=1")
    return parts, parse_value(value), text


def require_distinct(pending: list[tuple[list[str], Any, str]], options: Any) -> list[Problem]:
    """Return a problem for each override that a later one silently undoes.

    Args:
        pending: parts, value and text of each override, in order.
        options: the recipe's options; ``NAME=true`` is short for ``options.NAME=true``.
    """
    problems = []
    earlier: dict[tuple[str, ...], tuple[Any, str]] = {}
    for parts, value, text in pending:
        short = len(parts) == 1 and isinstance(options, dict) and parts[0] in options
        path = ("options", *parts) if short and parts[0] not in TOP else tuple(parts)
        for other, (old, old_text) in earlier.items():
            if other[: len(path)] == path and (other != path or old != value):
                message = f"{old_text!r:.80} is given too, and this would undo it"
                where = f"override {text!r:.80}"
                problems.append(Problem(".".join(path), message, "keep one of the two", where))
        earlier[path] = (value, text)
    return problems


def _below(path: str, value: Any) -> Iterator[str]:
    """Yield a dotted key, and the keys of a mapping assigned to it."""
    yield path
    for key, part in value.items() if isinstance(value, dict) else ():
        yield from _below(f"{path}.{key}", part)


def assign_all(tree, pending, where, problems, *, expanded: bool) -> dict:
    """Assign the overrides of names in the file, or, once it is expanded, of what matrices made."""
    options = tree.get("options")
    options = options if isinstance(options, dict) else {}
    for parts, value, text in pending:
        if len(parts) == 1 and parts[0] in options and parts[0] not in TOP:
            parts = ["options", *parts]
        entry, entries = ".".join(parts[:2]), tree.get(parts[0])
        of_expanded = entry in where.templates
        unknown = len(parts) > 2 and isinstance(entries, dict) and parts[1] not in entries
        if not expanded and ((unknown and parts[0] == "stages") or _may_expand(tree, parts)):
            where.later.add(text)  # it may name what a matrix expands to
        if expanded != (of_expanded or text in where.later):
            continue
        path = ".".join(parts)
        for below in _below(path, value):
            where.overrides[below] = f"override {masked(text)!r}"
        if unknown and parts[0] in ("stages", "data") and text in where.later:
            hint = did_you_mean(parts[1], entries, f"{parts[0]}:")
            problems.append(Problem(path, f"no {parts[0].rstrip('s')} {parts[1]!r}", hint))
            continue
        if parts[0] not in TOP or parts[0] == "sizes":
            near = did_you_mean(parts[0], [*TOP, *options])
            problems.append(Problem(path, "unknown key", near))
            continue
        node: Any = tree
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


def _may_expand(tree: Any, parts: list[str]) -> bool:
    """Return whether a name on an override's way is missing where a matrix will make names."""
    for part in parts:
        if not isinstance(tree, dict):
            return False
        if part not in tree:
            return any("{" in str(name) for name in tree)
        tree = tree[part]
    return False


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
    """Replace every ``${a.b}``: alone by the value of that key, inside a text by its text."""
    if not _has_interpolation(tree):
        return tree
    try:
        if _Unfolding(tree).size(tree, "", ()) > LARGEST:
            raise _wrong("", "its references unfold to too much", "write less")
        resolved: Any = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
        return resolved
    except RecipeError as error:
        problems += error.problems
    except OmegaConfBaseException as error:
        key, message = getattr(error, "full_key", "") or "", str(error).split("\n")[0]
        problems.append(Problem(key, message))
    return tree


class _Unfolding:
    """The size of a tree with every ``${a.b}`` replaced, worked out without replacing any."""

    def __init__(self, tree: dict) -> None:
        self.tree, self.known = tree, {}

    def size(self, node: Any, path: str, above: tuple[str, ...]) -> int:
        if isinstance(node, dict):
            below = (self.size(v, f"{path}.{k}".lstrip("."), above) for k, v in node.items())
            return 1 + sum(below)
        if isinstance(node, list):
            return 1 + sum(self.size(v, f"{path}.{i}", above) for i, v in enumerate(node))
        if not isinstance(node, str) or "${" not in node:
            return 1 + len(str(node))
        if "${" in REFERENCE.sub("", node):
            raise _wrong(path, f"{node!r:.80} is not a reference", "${key.of.the.recipe}")
        return 1 + sum(self.size_at(m[1], path, above) for m in REFERENCE.finditer(node))

    def size_at(self, dotted: str, path: str, above: tuple[str, ...]) -> int:
        """Return the size of a key's value.

        Raises:
            RecipeError: there is no such key, it leads back to itself, or it unfolds to too much.
        """
        if dotted in above or len(above) > DEEPEST:
            trail = " -> ".join((*above, dotted))
            raise _wrong(path, f"a cycle of references, or too long a chain: {trail}")
        if dotted not in self.known:
            node: Any = self.tree
            for part in dotted.split("."):
                if not isinstance(node, dict) or part not in node:
                    message = f"${{{dotted:.80}}} names no key of the recipe"
                    raise _wrong(path, message, "${key.of.the.recipe}; the environment is not read")
                node = node[part]
            self.known[dotted] = self.size(node, dotted, (*above, dotted))
            if self.known[dotted] > UNFOLDED:
                raise _wrong(path, "its references unfold to too much", "write less")
        return self.known[dotted]


def _wrong(path: str, message: str, hint: str = "") -> RecipeError:
    return RecipeError([Problem(path, message, hint)])


def _has_interpolation(tree: Any) -> bool:
    if isinstance(tree, dict):
        return any(_has_interpolation(v) for v in tree.values())
    if isinstance(tree, list):
        return any(map(_has_interpolation, tree))
    return isinstance(tree, str) and "${" in tree


def size_of(tree: Any, longest: int = 0) -> int:
    """Return the characters and entries of a tree; ``longest`` counts for each placeholder."""
    if isinstance(tree, dict):
        return 1 + sum(size_of(k, longest) + size_of(v, longest) for k, v in tree.items())
    if isinstance(tree, list):
        return 1 + sum(size_of(v, longest) for v in tree)
    return 1 + (len(tree) + longest * tree.count("{") if isinstance(tree, str) else 0)


def expand(tree: Any, where: Where, problems: list[Problem], path: str = "") -> Any:
    """Replace each entry that has a ``matrix`` by one per combination of its axes, at any depth.

    An entry with nothing beside it but ``value`` becomes that value.
    """
    if not isinstance(tree, dict):
        return tree
    out: dict[str, Any] = {}
    for name, entry in tree.items():
        here = f"{path}.{name}" if path else str(name)
        named = path in ("stages", "data") or "{" in str(name)
        if not (named and isinstance(entry, dict) and "matrix" in entry):
            if name in out:
                problems.append(Problem(here, "a matrix expands to this name too"))
            out[name] = expand(entry, where, problems, here)
            continue
        body = {k: v for k, v in entry.items() if k != "matrix"}
        body = body["value"] if list(body) == ["value"] else body
        cost = size_of({str(name): body}, len(str(entry["matrix"])))
        for values in _combinations(entry["matrix"], str(name), here, problems):
            where.size += cost
            if where.size > LARGEST:
                problems.append(Problem(f"{here}.matrix", "matrices unfold to too much"))
                break
            expanded = str(_fill(name, values))
            if expanded in out:
                problems.append(Problem(here, f"expands to {expanded!r} twice"))
            if path in ("stages", "data"):
                where.templates[f"{path}.{expanded}"] = here
            out[expanded] = expand(_fill(body, values), where, problems, f"{path}.{expanded}")
    return out


def _combinations(axes: Any, name: str, path: str, problems: list[Problem]) -> list[dict]:
    """Return the values of the placeholders, one mapping per combination of the axes.

    Axes are lists, or mappings that give each value keys of its own. The list is empty if they are
    not well formed.
    """
    good = isinstance(axes, dict) and axes and all(_is_axis(v) for v in axes.values())
    missing = [a for a in axes if f"{{{a}}}" not in name] if good else []
    if not good or missing:
        message = "expected axis: [values], or axis: {value: {key: ...}}"
        if missing:
            message = f"the name lacks {{{missing[0]}}}"
        problems.append(Problem(f"{path}.matrix", message, "matrix: {domain: [a, b]}"))
        return []
    if math.prod(map(len, axes.values())) > MOST:
        problems.append(Problem(f"{path}.matrix", f"expands to more than {MOST} entries"))
        return []
    combinations = []
    for combination in itertools.product(*axes.values()):
        values: dict[str, Any] = {}
        for axis, value in zip(axes, combination, strict=True):
            if value is None:
                hint = "quote it, or name it: ~ and null stand for nothing"
                problems.append(Problem(f"{path}.matrix.{axis}", "a value is empty", hint))
                return []
            values[axis] = value
            own = axes[axis][value] if isinstance(axes[axis], dict) else {}
            values |= {f"{axis}.{k}": v for k, v in own.items()}
        combinations.append(values)
    return combinations


def _is_axis(axis: Any) -> bool:
    if isinstance(axis, dict):
        return bool(axis) and all(isinstance(v, dict) for v in axis.values())
    return isinstance(axis, list) and bool(axis)


def _fill(tree: Any, values: dict[str, Any]) -> Any:
    """Fill in placeholders; a text that is one placeholder keeps the type of its value."""
    if isinstance(tree, str):
        whole = re.fullmatch(r"\{([\w.]+)\}", tree)
        if whole and whole[1] in values:
            return values[whole[1]]
        return re.sub(r"\{([\w.]+)\}", lambda m: str(values.get(m[1], m[0])), tree)
    if isinstance(tree, dict):
        return {str(_fill(k, values)): _fill(v, values) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_fill(v, values) for v in tree]
    return tree
