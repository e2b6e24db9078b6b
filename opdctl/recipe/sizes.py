"""The size of a recipe: an overlay on all of it, with keys for whole kinds of stages.

sizes:
  small:
    kinds: {rl: {optim: {lr: 1.0e-6}}}      keys of every stage of a kind
    stages: {t_math: {optim: {lr: 5.0e-7}}} keys of one; these win over those of its kind
"""

from __future__ import annotations

import copy
from typing import Any

from opdctl.config.schema import did_you_mean
from opdctl.errors import Problem
from opdctl.recipe.layers import ENTRIES, Layer


def lay_size(layer: Layer, size: str, problems: list[Problem]) -> Layer:
    """Return a recipe with one of its sizes laid over it, and without the others.

    Entries that the recipe or the size sets to null are gone.

    Args:
        size: its name; empty is the recipe's own, or ``tiny``.
        problems: what is wrong is added to them.
    """
    sizes = layer.tree.get("sizes") or {}
    size = size or str(layer.tree.get("size") or "tiny")
    plain = layer.without("sizes")
    if not isinstance(sizes, dict):
        problems.append(Problem("sizes", "expected a mapping"))
        return plain
    if size not in sizes and size != "tiny":
        known = list(dict.fromkeys(["tiny", *sizes]))
        problems.append(Problem("size", f"no size {size!r}", did_you_mean(size, known, "sizes:")))
    elif isinstance(sizes.get(size), dict):
        plain = Layer(copy.deepcopy(plain.tree), plain.lines)
        plain = plain.under(_overlay(plain, layer.part("sizes", size), f"sizes.{size}", problems))
    elif sizes.get(size):
        problems.append(Problem(f"sizes.{size}", "expected a mapping"))
    tree = {**plain.tree, "size": size}
    for part in ("stages", "data", "claims", "models"):
        if isinstance(tree.get(part), dict):
            tree[part] = {k: v for k, v in tree[part].items() if v is not None}
    of_sizes = {k: line for k, line in layer.lines.items() if k.split(".")[0] == "sizes"}
    return Layer(tree, {**of_sizes, **plain.lines})


def _overlay(plain: Layer, over: Layer, path: str, problems: list[Problem]) -> Layer:
    """Return a size in which the keys of its kinds stand in each stage of the kind."""
    kinds = over.tree.get("kinds") or {}
    keys, over = over.part("kinds"), over.without("kinds")
    for part in ENTRIES:  # an entry that the recipe removes is not given back in part
        gone = {name for name, entry in plain.part(part).tree.items() if entry is None}
        if gone and over.part(part).tree:
            kept = over.part(part).tree.items()
            kept = {name: entry for name, entry in kept if name not in gone or _kind_of(entry)}
            over = Layer({**over.tree, part: kept}, over.lines)
    if not isinstance(kinds, dict):
        problems.append(Problem(f"{path}.kinds", "expected a mapping, kind: keys of its stages"))
        return over
    for kind, entry in kinds.items():
        if isinstance(entry, dict):
            over = _with_kind(plain, over, kind, keys.part(kind), path, problems)
        else:
            problems.append(Problem(f"{path}.kinds.{kind}", "expected a mapping, keys of stages"))
    return over


def _with_kind(
    plain: Layer, over: Layer, kind: str, keys: Layer, path: str, problems: list[Problem]
) -> Layer:
    """Return a size with keys of a kind laid under its own of each stage of that kind."""
    stages, named = plain.part("stages").tree, over.part("stages").tree
    of_kind = {n: _kind_of(named.get(n)) or _kind_of(stages.get(n)) for n in {**stages, **named}}
    if kind not in of_kind.values():
        near = did_you_mean(kind, sorted(set(of_kind.values()) - {""}), "kinds:")
        problems.append(Problem(f"{path}.kinds.{kind}", f"no stage of kind {kind!r}", near))
    for name in (n for n, k in of_kind.items() if k == kind):
        if isinstance(named.get(name, {}), dict):  # null removes the stage
            laid = keys.under(over.part("stages", name)).at("stages", name)
            named = {**named, **laid.tree["stages"]}
            over = Layer({**over.tree, "stages": named}, {**over.lines, **laid.lines})
    return over


def _kind_of(entry: Any) -> str:
    return str(entry.get("kind") or "") if isinstance(entry, dict) else ""
