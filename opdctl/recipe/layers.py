"""Plain trees laid one over the other: a recipe on its base, a size on a recipe.

Mappings are merged key by key and the upper value wins. Two rules of their own hold for the entries
of ``data`` and ``stages``, at the top and in a size: one with a ``kind`` replaces the one of its
name, and one that is null removes it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

ENTRIES = ("data", "stages")


@dataclass(frozen=True)
class Layer:
    """A tree, and ``file:line`` of its dotted keys."""

    tree: dict[str, Any]
    lines: dict[str, str] = field(default_factory=dict)

    def under(self, over: Layer) -> Layer:
        """Return this layer with another laid over it; lines are of the value that won."""
        replaced: set[str] = set()
        tree = _merge(self.tree, over.tree, (), replaced)
        kept = {k: line for k, line in self.lines.items() if not _is_below(k, replaced)}
        return Layer(tree, {**kept, **over.lines})

    def part(self, *path: str) -> Layer:
        """Return what stands below a key as a layer of its own; empty if that is no mapping."""
        tree: Any = self.tree
        for name in path:
            tree = tree.get(name) if isinstance(tree, dict) else None
        prefix = "".join(f"{name}." for name in path)
        lines = {k.removeprefix(prefix): v for k, v in self.lines.items() if k.startswith(prefix)}
        return Layer(tree, lines) if isinstance(tree, dict) else Layer({})

    def at(self, *path: str) -> Layer:
        """Return the layer put below a key."""
        tree, prefix = self.tree, "".join(f"{name}." for name in path)
        for name in reversed(path):
            tree = {name: tree}
        return Layer(tree, {f"{prefix}{k}": line for k, line in self.lines.items()})

    def without(self, name: str) -> Layer:
        """Return the layer without one of its keys."""
        tree = {k: v for k, v in self.tree.items() if k != name}
        return Layer(tree, {k: v for k, v in self.lines.items() if k.split(".")[0] != name})


def _merge(tree: dict, over: dict, path: tuple[str, ...], replaced: set[str]) -> dict:
    """Return the merged tree; dotted keys whose old value is gone are added to ``replaced``."""
    merged = dict(tree)
    has_entries = path[-1:] in [(part,) for part in ENTRIES] and (
        len(path) == 1 or (len(path) == 3 and path[0] == "sizes")
    )
    for name, value in over.items():
        below = merged.get(name)
        if has_entries and isinstance(value, dict) and "kind" in value:
            below = merged.pop(name, None) and None
        if isinstance(below, dict) and isinstance(value, dict):
            merged[name] = _merge(below, value, (*path, name), replaced)
        else:
            replaced.add(".".join((*path, name)))
            merged[name] = copy.deepcopy(value)
    return merged


def _is_below(dotted: str, replaced: set[str]) -> bool:
    parts = dotted.split(".")
    return any(".".join(parts[:n]) in replaced for n in range(1, len(parts) + 1))
