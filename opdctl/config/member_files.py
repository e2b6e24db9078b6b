"""Members of one's own: files ``FAMILY/NAME.py`` in a folder, or in an installed package.

A folder is named by a recipe (``members: ./my_members``); a package by an entry point of the group
``opdctl.members``, whose value is a module with the same layout. Both hold one file a member, as
the package does. Importing them runs their code: nothing here asks whether it may, its callers do.

A folder's modules are imported under a package name made of its content, so that a file that was
edited is never taken for the one before, and from their source alone: byte code is chosen by the
second of its time, and a fingerprint must be that of the code that ran. They may import what stands
beside them (``from ._shared import x``), which belongs to their content.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import sys
import traceback
from collections.abc import Iterator
from functools import lru_cache
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.metadata import entry_points
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path

from opdctl import protocols
from opdctl.errors import UsageError

GROUP = "opdctl.members"

# Family -> what its members have, and what their Config has. ``a|b`` is one of both.
CONTRACTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "data": (("problems", "procedural", "prompts"), ("kind", "common_problems")),
    "verifiers": (("problems", "needs_answer", "score"), ()),
    "environments": (("alphabet", "refusal", "reply"), ("open", "close")),
    "teachers": (("keeps", "provides", "score"), ()),
    "signals": (("needs", "credit"), ("coef", "reward", "policy")),
    "objectives": (
        ("needs", "rows", "loss"),
        ("coef", "normalise", "weights", "k", "rank", "layers", "clip_low", "clip_high"),
    ),
    "weights": (("needs", "mask|factor|gate"), ()),
    "claims": (("statement", "source", "reported", "threshold", "conditions"), ()),
}

# Family -> the protocol whose declared hooks its members inherit.
BASES: dict[str, type] = {
    "environments": protocols.Environment,
    "signals": protocols.Signal,
    "objectives": protocols.Objective,
    "weights": protocols.Weight,
    "claims": protocols.Claim,
}


@dataclasses.dataclass(frozen=True)
class MemberFolder:
    """A place that holds members of one's own.

    Attributes:
        root: the folder above the families.
        package: the name that its modules are imported under.
    """

    root: Path
    package: str

    def names(self, family: str) -> dict[str, Path]:
        """The members of a family and their files.

        Raises:
            UsageError: a file's name is no name of a member.
        """
        files = {}
        for path in sorted((self.root / family).glob("*.py")):
            if path.name.startswith("_"):
                continue
            if not (path.stem.isidentifier() and path.stem.islower() and path.stem.isascii()):
                hint = "small letters, digits and _; the class is named after it: my_one, MyOne"
                raise UsageError(f"{path}: not the name of a member", hint)
            files[path.stem] = path
        return files

    def member(self, family: str, name: str) -> type:
        """The class of a member, imported and checked.

        Raises:
            UsageError: it cannot be imported, or lacks what its family asks for; names file and
                line.
        """
        path = self.root / family / f"{name}.py"
        try:
            module = importlib.import_module(f"{self.package}.{family}.{name}")
        except (Exception, SystemExit) as error:  # a stranger's code may raise anything
            message = f"{_place(error, self.root, path)}: {type(error).__name__}: {error!s:.500}"
            raise UsageError(message, f"the member {name!r} of {family} is not imported") from error
        require_contract(vars(module), family, name, path)
        return getattr(module, class_name(name))

    def contents(self, family: str, name: str) -> dict[str, str]:
        """Return hashes of a member's file and of those it imports from this folder, by path."""
        files = {self.root / family / f"{name}.py"}
        waiting = list(files)
        while waiting:
            beside = set(_beside(waiting.pop(), self.root)) - files
            files |= beside
            waiting += beside
        return {p.relative_to(self.root).as_posix(): _digest(p.read_bytes()) for p in files}


def class_name(name: str) -> str:
    """Return the class name of a member's file name: ``reverse_kl`` -> ``ReverseKl``."""
    return "".join(part.capitalize() for part in name.split("_"))


def open_folder(folder: Path) -> MemberFolder:
    """A folder of members, its modules ready to be imported; nothing is imported yet.

    Raises:
        UsageError: there is no such folder, or no member in it.
    """
    root = folder.resolve()
    if not root.is_dir():
        raise UsageError(f"members: no folder {folder}", "a folder with files FAMILY/NAME.py")
    files = sorted([*root.glob("*.py"), *root.glob("*/*.py")])
    families = {path.parent.name for path in files if path.parent != root}
    for name in sorted(families - set(CONTRACTS)):
        if f"{name}s" in CONTRACTS:  # others may hold tests, notes, what members share
            hint = f"its name is {name}s, as `opdctl ls` has it"
            raise UsageError(f"members: {root / name} is named after no family", hint)
    if not families & set(CONTRACTS):
        hint = f"one file a member: {root}/FAMILY/NAME.py, FAMILY one of {', '.join(CONTRACTS)}"
        raise UsageError(f"members: no member in {folder}", hint)
    content = "".join(f"{path}\0{_digest(path.read_bytes())}\n" for path in files)
    package = f"opdctl_members_{_digest(content.encode())}"
    if not any(isinstance(f, _Finder) and f.package == package for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder(root, package))
    return MemberFolder(root, package)


@lru_cache
def installed() -> tuple[MemberFolder, ...]:
    """The packages that an entry point names; they are imported as any other.

    Raises:
        UsageError: an entry point names no package.
    """
    folders = []
    for point in sorted(entry_points(group=GROUP), key=lambda p: (p.name, p.value)):
        try:
            spec = find_spec(point.value)
        except (ImportError, ValueError) as error:
            raise UsageError(
                f"entry point {GROUP}: {point.name} = {point.value}: {error}"
            ) from None
        roots = list(spec.submodule_search_locations or ()) if spec else []
        if not roots:
            hint = "its value is a package that holds FAMILY/NAME.py"
            message = f"entry point {GROUP}: {point.name} = {point.value}: no such package"
            raise UsageError(message, hint)
        folders += [MemberFolder(Path(root), point.value) for root in roots]
    return tuple(folders)


def require_contract(names: dict, family: str, name: str, path: Path) -> None:
    """Require a class of the file's name, with what its family asks for.

    Raises:
        UsageError: it is not so; names the file, the line and what is missing.
    """
    wanted = class_name(name)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lines = {node.name: node.lineno for node in tree.body if isinstance(node, ast.ClassDef)}
    cls = names.get(wanted)
    if not isinstance(cls, type):
        others = ", ".join(f"{other} in line {line}" for other, line in lines.items())
        hint = f"the class of {path.name} is {wanted}" + (f"; there is {others}" if others else "")
        raise UsageError(f"{path}:1: no class {wanted}", hint)
    place = f"{path}:{lines.get(wanted, 1)}: {wanted}"
    if not (vars(cls).get("__doc__") or "").strip():
        raise UsageError(f"{place} has no docstring", "its first line is what `opdctl ls` prints")
    if type(vars(cls).get("revision")) is not int:
        hint = "revision = 1, and 2 once its mathematics changes: it is in every fingerprint"
        raise UsageError(f"{place} has no revision", hint)
    config = getattr(cls, "Config", None)
    if not (isinstance(config, type) and dataclasses.is_dataclass(config)):
        hint = "@dataclass(kw_only=True) class Config inside it, whose fields are its keys"
        raise UsageError(f"{place} has no nested dataclass Config", hint)
    base = BASES.get(family)
    if base is not None and base not in cls.__mro__:
        hint = f"class {wanted}({base.__name__}):, from opdctl.protocols import {base.__name__}"
        raise UsageError(f"{place} does not inherit from {base.__name__}", hint)
    of_class, of_config = CONTRACTS[family]
    for words in of_class:
        missing = getattr(cls, "__abstractmethods__", frozenset())
        if not any(hasattr(cls, word) and word not in missing for word in words.split("|")):
            message = f"{place} has no {words.replace('|', ', ')}"
            raise UsageError(message, f"every member of {family} has: `opdctl new {family} NAME`")
    fields = {f.name for f in dataclasses.fields(config)}
    lacking = [word for word in of_config if word not in fields and not hasattr(config, word)]
    if lacking:
        hint = f"inherit the keys of its family, as `opdctl new {family} NAME` writes it"
        raise UsageError(f"{place}.Config has no {lacking[0]}", hint)


class _FromSource(SourceFileLoader):
    """A loader that reads no byte code and writes none."""

    def get_code(self, fullname: str):
        """Return the code of the file as it stands."""
        return self.source_to_code(self.get_data(self.path), self.path)


class _Finder:
    """The finder of one folder's modules, under one package name."""

    def __init__(self, root: Path, package: str) -> None:
        self.root, self.package = root, package

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        """Return where a module stands; None for all but this folder's."""
        first, *rest = fullname.split(".")
        if first != self.package:
            return None
        place = self.root.joinpath(*rest)
        file = place.with_name(f"{place.name}.py")
        if rest and file.is_file():
            loader = _FromSource(fullname, str(file))
            return spec_from_file_location(fullname, file, loader=loader)
        if not place.is_dir():
            return None
        spec = ModuleSpec(fullname, None, is_package=True)
        spec.submodule_search_locations = [str(place)]
        return spec


def _beside(path: Path, root: Path) -> Iterator[Path]:
    """Yield the files below the root that a file imports: relatively, or by whole names that the
    import path leads to them."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return  # its import will say so
    above = [Path(entry).resolve() for entry in sys.path]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names, folders = [alias.name for alias in node.names], above
        elif isinstance(node, ast.ImportFrom):
            names = [".".join(filter(None, (node.module, a.name))) for a in node.names]
            names += [node.module] if node.module else []
            folders = [path.parents[node.level - 1]] if node.level else above
        else:
            continue
        for folder in folders:
            for name in names:
                yield from _files_of(folder, name, root)


def _files_of(folder: Path, name: str, root: Path) -> Iterator[Path]:
    """Yield the files below the root that importing a dotted name from a folder runs."""
    parts = name.split(".")
    module = folder.joinpath(*parts)
    inits = [folder.joinpath(*parts[: n + 1], "__init__.py") for n in range(len(parts))]
    for file in (module.with_name(f"{module.name}.py"), *inits):
        if file.is_file() and file.is_relative_to(root):
            yield file


def _place(error: BaseException, root: Path, path: Path) -> str:
    """The file and the line that an import failed in."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if Path(f.filename).is_relative_to(root)]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else str(path)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()
