"""List and describe recipes, stage kinds, members, methods, claims and runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from opdctl.config import registry
from opdctl.config.describe import describe
from opdctl.config.schema import did_you_mean, flatten
from opdctl.config.settings import Runtime
from opdctl.errors import UsageError
from opdctl.recipe.methods import method, methods
from opdctl.recipe.recipe import lookup
from opdctl.recipe.source import find, read, read_source, shipped
from opdctl.recipe.yaml_lines import parse
from opdctl.rollout.extraction import Extract
from opdctl.run.rundir import RunDir, read_json


def listing(kind: str, folder: Path | None = None) -> list[dict[str, str]]:
    """Return a row with ``name`` and ``about`` for each entry of a list.

    Args:
        kind: ``recipes``, ``methods``, ``runs`` or a family; empty lists these kinds themselves.
        folder: of members of one's own, which are listed too; their code runs.

    Raises:
        UsageError: no such kind.
    """
    registry.use_members(folder)
    if not kind:
        kinds = {
            "recipes": "pipelines that come with opdctl",
            "methods": "compositions for `opdctl stage --method`",
            "runs": "run directories under ./runs",
            **registry.FAMILIES,
        }
        return [{"name": k, "about": v} for k, v in kinds.items()]
    if kind == "recipes":
        return [{"name": n, "about": read_source(n).layer.tree.get("about", "")} for n in shipped()]
    if kind == "methods":
        return [{"name": n, "about": method(n).get("about", "")} for n in methods()]
    if kind == "runs":
        return [
            {"name": str(p.parent), "about": _run_line(p.parent)}
            for p in sorted(Path("runs").glob("*/run.json"))
        ]
    if kind in registry.FAMILIES:
        return [{"name": n, "about": _about(kind, n)} for n in registry.members(kind)]
    known = ["recipes", "methods", "runs", *registry.FAMILIES]
    raise UsageError(f"nothing called {kind!r} to list", did_you_mean(kind, known, "one of"))


def _about(family: str, name: str) -> str:
    """Return the first line of a member's docstring; of one's own with its file."""
    line, file = registry.first_line(registry.member(family, name)), registry.file_of(family, name)
    return f"{line} ({file})" if file else line


def _run_line(folder: Path) -> str:
    manifest = read_json(folder / "run.json") or {}
    stages = [RunDir(folder).record(p.name).get("status") for p in folder.glob("stages/*")]
    done = f"{stages.count('done')}/{len(stages)} stages done" if stages else "a set of seeds"
    return f"{manifest.get('recipe')} {manifest.get('size')}: {done}"


def detail(name: str, folder: Path | None = None) -> dict:
    """Return ``about``, ``keys`` and ``text`` of a stage kind, member, method or recipe.

    Where a member has the name of a method, ``also`` describes it, and its keys follow those of the
    method behind ``FAMILY/NAME: ``.

    Args:
        folder: of members of one's own, which are shown too; their code runs.

    Raises:
        UsageError: nothing has this name.
    """
    registry.use_members(folder)
    wanted = name.lower()
    matches = [(f, wanted) for f in registry.FAMILIES if wanted in registry.members(f)]
    if "/" in name:
        family, wanted = name.split("/", 1)
        matches = [
            (f, m)
            for f, m in [(family, wanted)]
            if f in registry.FAMILIES and m in registry.members(f)
        ]
    if matches:
        shown: dict[str, Any] = _method(name) if name in methods() else {"name": name}
        keys, about = shown.get("keys", []), []
        alone = not keys and len(matches) == 1
        for family, member in matches:
            cls = registry.member(family, member)
            about.append(f"{family}/{member}: {(cls.__doc__ or '').strip()}")
            about.append((sys.modules[cls.__module__].__doc__ or "").strip())
            if file := registry.file_of(family, member):
                about.append(f"one's own: {file}")
            prefix = "" if alone else f"{family}/{member}: "
            keys += _member_keys(cls, family, prefix)
        field = "also" if "about" in shown else "about"
        return {**shown, field: "\n".join(about), "keys": keys, "more": _more(keys)}
    if name == "runtime":
        about = "keys of `runtime:` in a recipe, or runtime.KEY=VALUE behind any command that runs"
        return {"name": name, "about": about, "keys": describe(Runtime, lookup, "runtime.")}
    if name in methods():
        return _method(name)
    if name in shipped() or Path(name).is_file():
        return {"name": name, **_recipe(name)}
    everything = [
        "runtime",
        *shipped(),
        *methods(),
        *(m for f in registry.FAMILIES for m in registry.members(f)),
    ]
    raise UsageError(f"nothing called {name!r}", did_you_mean(name, everything, "try `opdctl ls`:"))


def _member_keys(cls: type, family: str, prefix: str) -> list[dict[str, str]]:
    """Return a row per key; of a verifier also its domain's, which say what it is given."""
    rows = describe(cls.Config, lookup, prefix) if hasattr(cls, "Config") else []
    if family == "verifiers":
        for part in ("extract", "reference"):
            rows += describe(Extract, lookup, f"data.NAME.{part}.")
    return rows


def _recipe(name: str) -> dict:
    """Return a recipe's path and text, and below it the text of each recipe it builds on."""
    files = read_source(name).files
    own, *bases = files.items()
    text = own[1] + "".join(f"\n# base: {path}\n\n{below}" for path, below in bases)
    return {"about": ", on ".join(files), "text": text}


def _method(name: str) -> dict:
    """Return a method's file, and every key of its stage kind with the method's values."""
    tree, kind = method(name), method(name)["kind"]
    chosen = {k: v for k, v in flatten(tree).items() if k not in ("about", "kind")}
    keys = describe(registry.member("stages", kind).Config, lookup)
    for row in keys:
        if row["key"] in chosen:
            row["default"] = str(chosen[row["key"]])
        elif row["key"] in tree:
            row["default"] = str(tree[row["key"]])
    about = f"{tree.get('about', '')}\nopdctl stage {kind} --method {name}"
    if name in shipped():
        about += f"\nthe recipe of this name: {shipped()[name]}"
    text = methods()[name].read_text(encoding="utf-8")
    return {"name": name, "about": about, "text": text, "keys": keys, "more": _more(keys)}


def _more(keys: list[dict]) -> str:
    """Return a line for each family that keys take members of: how to list it and show one."""
    families = dict.fromkeys(row["type"][:-1] for row in keys if row["type"].endswith("/"))
    lines = [f"{f}: `opdctl ls {f}`, keys of one: `opdctl show {f}/NAME`" for f in families]
    return "\n".join(lines)


def copy(name: str, dest: Path) -> str:
    """Write a shipped recipe or method to a new file. Return its path.

    A recipe that builds on another is written as one file that needs no other.

    Raises:
        UsageError: the name is neither, or the file exists.
    """
    known = {**methods(), **shipped()}  # a name of both is the recipe
    if name not in known and not Path(name).is_file():
        raise UsageError(f"no recipe or method {name}", did_you_mean(name, known, "one of"))
    source = known.get(name) or find(name)
    if dest.is_dir():
        dest = dest / source.name
    if dest.exists():
        raise UsageError(f"{dest} exists", "choose another name")
    try:
        dest.write_text(_standing_alone(source), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {dest}: {error.strerror}") from None
    return re.sub(r"^\./", "", str(dest))


def _standing_alone(path: Path) -> str:
    """Return the text of a recipe or method that needs no other file."""
    text = read(path)
    is_recipe = {"stages", "base"} & parse(text, path.name)[0].keys()
    return read_source(str(path)).text if is_recipe else text
