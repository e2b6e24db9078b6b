"""The text of a recipe: a file, and the files that it builds on.

    base: mimo.yaml       a file beside this one, or the name of a shipped recipe

What this file says is laid over what its base says; ``layers.py`` has the rules. A base may have a
base of its own.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from opdctl.config.files import read_text
from opdctl.config.schema import did_you_mean
from opdctl.errors import Problem, RecipeError, UsageError
from opdctl.recipe.layers import Layer
from opdctl.recipe.yaml_lines import LONGEST, dump, parse

MOST_FILES = 8  # a recipe and its bases


@dataclass(frozen=True)
class Source:
    """A recipe as it was written, its base merged in.

    Attributes:
        layer: the tree, with the file and line of each key.
        problems: duplicate keys, and values that are not plain.
        text: YAML of the tree that needs no other file: the file itself if it has no base.
        files: text of each file it was read from, by path; its own first.
    """

    layer: Layer
    problems: list[Problem]
    text: str
    files: dict[str, str]

    @property
    def digests(self) -> dict[str, str]:
        """The hash of each file, by path."""
        return {
            path: hashlib.sha256(text.encode()).hexdigest()[:32]
            for path, text in self.files.items()
        }


def shipped() -> dict[str, Path]:
    """Return the recipes that come with opdctl, by name."""
    here = Path(str(resources.files("opdctl")))
    for folder in (here / "recipes", here.parent / "recipes"):
        if folder.is_dir():
            return {p.stem: p for p in sorted(folder.glob("*.yaml"))}
    return {}


def find(name: str) -> Path:
    """Return the file of a recipe: a path, or the name of a shipped one.

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
    """Return the text of a recipe file.

    Raises:
        UsageError: it cannot be read, is not UTF-8, or is too long for a recipe.
    """
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}", "a recipe is a text file, UTF-8") from None
    if len(text) > LONGEST:
        raise UsageError(f"{path} is longer than {LONGEST} characters", "is it a recipe?")
    return text


def read_source(name: str) -> Source:
    """Read a recipe and what it builds on.

    Args:
        name: a path, or the name of a shipped recipe.

    Raises:
        UsageError: no such file, or one of them is not a mapping in YAML.
        RecipeError: a base that is not there, that leads back to itself, or too many of them.
    """
    path: Path | None = find(name)
    label = str(path)
    layers: list[Layer] = []
    problems: list[Problem] = []
    files: dict[str, str] = {}
    known: list[Path] = []
    while path:
        text = files[str(path)] = read(path)
        tree, lines, wrong = parse(text, str(path))
        problems += wrong
        known.append(path)
        layer = Layer(tree, lines)
        layers.append(layer.without("base"))
        try:
            path = _base(layer, known)
        except UsageError as error:
            place = lines.get("base", "")
            problem = Problem("base", error.message, error.hint, place)
            raise RecipeError([problem], label) from None
    if len(layers) > 1:  # the merged text may stand elsewhere
        layers = [_anchored(layer, file.parent) for layer, file in zip(layers, known, strict=True)]
    merged = layers.pop()
    while layers:
        merged = merged.under(layers.pop())
    own = next(iter(files.values()))
    about = f"# {', '.join(files)}: merged into one\n"
    return Source(merged, problems, own if len(files) == 1 else about + dump(merged.tree), files)


def _anchored(layer: Layer, folder: Path) -> Layer:
    """Return a layer whose ``members``, a path from its file's folder, is absolute."""
    members = layer.tree.get("members")
    if not isinstance(members, str) or not members:
        return layer
    whole = str((folder / os.path.expanduser(members)).absolute())
    return Layer({**layer.tree, "members": whole}, layer.lines)


def _base(layer: Layer, known: list[Path]) -> Path | None:
    """Return the file that a recipe builds on; None if it builds on none.

    Args:
        known: the files read so far; the last is the recipe.

    Raises:
        UsageError: it is not there, leads back to one of those, or they are too many.
    """
    base = layer.tree.get("base")
    if base is None:
        return None
    if not isinstance(base, str) or not base.isprintable():
        raise UsageError(f"expected a file, got {base!r:.80}", "base: other.yaml, or a shipped one")
    beside = known[-1].parent / base
    path = beside if os.path.isfile(beside) else shipped().get(base)
    if path is None:
        near = did_you_mean(Path(base).stem, shipped(), "a file beside this one, or one of")
        raise UsageError(f"no recipe {base:.80}", near)
    if path.resolve() in [other.resolve() for other in known]:
        trail = " -> ".join(str(other) for other in (*known, path))
        raise UsageError(f"a circle of bases: {trail}", "a recipe builds on others only")
    if len(known) == MOST_FILES:
        raise UsageError(f"more than {MOST_FILES} files build on each other", "merge some of them")
    return path
