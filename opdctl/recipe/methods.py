"""Methods of the literature: small YAML files that compose members."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from opdctl.config.schema import did_you_mean
from opdctl.errors import UsageError
from opdctl.recipe.yaml_lines import parse


def methods() -> dict[str, Path]:
    """Return the shipped methods by name."""
    folder = Path(str(resources.files("opdctl"))) / "methods"
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def method_file(name: str) -> Path | None:
    """Return the file of a shipped method, or of one's own: a path that ends in .yaml."""
    own = Path(name)
    return own if own.suffix in (".yaml", ".yml") and own.is_file() else methods().get(name)


def method(name: str) -> dict:
    """Return the keys a method sets, and its ``about`` and ``kind``.

    Raises:
        UsageError: no such method, or its file is a recipe.
    """
    path = method_file(name)
    if path is None:
        otherwise = "a file of your own, or one of"
        raise UsageError(f"no method {name!r}", did_you_mean(name, methods(), otherwise))
    keys = parse(path.read_text(encoding="utf-8"), name)[0]
    if "stages" in keys:
        raise UsageError(f"{name} is a recipe, not a method", f"opdctl run {name}")
    return keys
