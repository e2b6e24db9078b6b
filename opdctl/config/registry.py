"""Family and file name -> class. The file name is the registration.

``loss/signals/reverse_kl.py`` is the member ``reverse_kl`` of the family ``signals``; it defines
one class named after the file (``ReverseKl``) with a nested ``Config``. A member is imported when
asked for, and declares its Config without importing torch. Members of one's own stand beside them:
in the folder of the recipe that was read last, and in packages (``member_files.py``).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from functools import lru_cache
from importlib import resources
from pathlib import Path

from opdctl.config.member_files import (
    CONTRACTS,
    MemberFolder,
    class_name,
    installed,
    open_folder,
)
from opdctl.config.schema import did_you_mean
from opdctl.errors import UsageError

FOLDERS = {  # where a family stands in the package; a user speaks of the family alone
    "stages": "stages",
    "data": "rollout/data",
    "verifiers": "rollout/verifiers",
    "sources": "rollout/sources",
    "environments": "rollout/environments",
    "engines": "rollout/engines",
    "rewards": "rollout/rewards",
    "teachers": "scoring/teachers",
    "signals": "loss/signals",
    "objectives": "loss/objectives",
    "weights": "loss/weights",
    "controllers": "train/controllers",
    "preflight": "checks/preflight",
    "watchdogs": "train/watchdogs",
    "claims": "evidence/claims",
}

FAMILIES = {
    "stages": "what a recipe is made of",
    "data": "where prompts, answers and what verifies them come from",
    "verifiers": "whether an answer is right",
    "sources": "where a trajectory comes from",
    "environments": "answers to what a response asks, between its turns",
    "engines": "response ids with the sampler's own log-probs",
    "rewards": "one number per rollout",
    "teachers": "scores for a request",
    "signals": "per-token credit, no gradient, larger is better",
    "objectives": "per-token loss with a gradient",
    "weights": "per-token factor, no gradient",
    "controllers": "hooks on a step: they read it, or act on the weights after it",
    "preflight": "is this student, with these teachers, fit to start",
    "watchdogs": "eyes on what a training step logs; they warn, or stop the stage",
    "claims": "statements of the reports, judged on what a run measured",
}


_chosen: list[MemberFolder] = []  # that of the recipe which was read last; none or one


@lru_cache
def shipped(family: str) -> tuple[str, ...]:
    """Return the names of the members of a family that come with opdctl, sorted."""
    folder = resources.files("opdctl") / FOLDERS[family]
    names = (entry.name for entry in folder.iterdir())
    return tuple(sorted(n[:-3] for n in names if n.endswith(".py") and not n.startswith("_")))


def use_members(folder: str | Path | None) -> None:
    """Make the members of one's own in a folder known, in place of those of another one; None
    leaves those of installed packages. A member is imported when it is asked for: its code runs.

    Raises:
        UsageError: no such folder, no member in it, or one with a name that opdctl has.
    """
    _chosen.clear()
    if folder is not None:
        opened = open_folder(Path(folder))
        for family in CONTRACTS:
            _require_new(family, opened.names(family))
        _chosen.append(opened)


def own_members(family: str) -> dict[str, MemberFolder]:
    """The members of one's own of a family, and the place of each.

    Raises:
        UsageError: a name is there twice; names both files.
    """
    places: dict[str, MemberFolder] = {}
    for place in (*_chosen, *installed()) if family in CONTRACTS else ():
        files = place.names(family)
        _require_new(family, files)
        for name in files:
            if name in places:
                both = f"{places[name].names(family)[name]} and {files[name]}"
                raise UsageError(f"two members {name!r} in {family}: {both}", "rename one")
            places[name] = place
    return places


def _require_new(family: str, files: dict[str, Path]) -> None:
    taken = [name for name in files if name in shipped(family)]
    if taken:
        message = f"{files[taken[0]]}: opdctl has a member {taken[0]!r} in {family}"
        raise UsageError(message, "rename the file and its class: none is replaced silently")


def members(family: str) -> tuple[str, ...]:
    """Return the names of all members of a family, one's own included, sorted."""
    return tuple(sorted((*shipped(family), *own_members(family))))


def member(family: str, name: str) -> type:
    """The class of a member.

    Raises:
        UsageError: no such member, and names the nearest; or one of one's own that cannot be used.
    """
    if name in shipped(family):
        return _shipped_member(family, name)
    places = own_members(family)
    if name not in places:
        near = did_you_mean(name, (*shipped(family), *places), "one of")
        raise UsageError(f"no member {name!r} in {family}/", near)
    return places[name].member(family, name)


@lru_cache
def _shipped_member(family: str, name: str) -> type:
    module = importlib.import_module(f"opdctl.{FOLDERS[family].replace('/', '.')}.{name}")
    return getattr(module, class_name(name))


def file_of(family: str, name: str) -> Path | None:
    """The file of a member of one's own; None for one that comes with opdctl."""
    if name in shipped(family):
        return None
    return own_members(family)[name].names(family)[name]


def own_contents(names: Iterable[str]) -> dict[str, str]:
    """Return the hashes of own members among ``FAMILY/NAME`` and of the files that they import from
    beside them, by path below the folder of members; empty without any."""
    hashes: dict[str, set[str]] = {}
    for family, name in (name.split("/") for name in names):
        if name not in shipped(family):
            for path, digest in own_members(family)[name].contents(family, name).items():
                hashes.setdefault(path, set()).add(digest)
    return {path: " ".join(sorted(digests)) for path, digests in sorted(hashes.items())}


def needs_of(cls: type, config: object) -> tuple[str, ...]:
    """Return all that a member needs with these keys: ``needs``, and ``needs_for(config)``."""
    return (*cls.needs, *cls.needs_for(config))


def parse_need(need: str) -> tuple[str, str]:
    """Split ``teacher.hidden{all}`` into the need and its subject; "" where it has none."""
    name, _, about = need.partition("{")
    return name, about.removesuffix("}")


def config_of(family: str, name: str, **keys: object) -> object:
    """A member's Config with some keys set, for a stage that always uses it."""
    return member(family, name).Config(**keys)


def first_line(cls: type) -> str:
    """The first line of a member's docstring: what ``opdctl ls`` prints."""
    return (inspect.getdoc(cls) or "").split("\n", 1)[0]
