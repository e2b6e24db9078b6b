"""The key ``members`` of a recipe: a folder of code, which is imported only where someone said so.

A path in a recipe is relative to its file, one typed as an override to the working directory, and a
run's resolved recipe holds it whole. What runs a recipe imports it; what only reads one refuses
until it is told to, since a recipe may come from anyone. A folder that was allowed once in this
process stays so: its code ran already.
"""

from __future__ import annotations

import os
from pathlib import Path

from opdctl.config import registry
from opdctl.errors import Problem, UsageError

VARIABLE = "OPDCTL_TRUST_MEMBERS"

_trusted: set[Path] = set()
_all_trusted = False


def trust_all(trusted: bool) -> None:
    """Let recipes that are only read bring members too, or not any more."""
    global _all_trusted
    _all_trusted = trusted


def use_members_of(tree: dict, label: str, overridden: bool, trusted: bool) -> Problem | None:
    """Make the members of a recipe known to the registry, or none if it names none; its path
    becomes absolute in the tree. Returns what is wrong with the key.

    Args:
        label: the recipe's file, as messages name it.
        overridden: the path was typed, so it is relative to the working directory.
        trusted: the recipe is about to be run, so its code may be imported.
    """
    registry.use_members(None)
    path = tree.get("members")
    if path is None or path == "":
        return None
    if not isinstance(path, str) or not path.isprintable():
        return Problem("members", f"expected a folder, got {path!r:.80}", "members: ./my_members")
    above = Path() if overridden else Path(label).parent
    folder = (above / os.path.expanduser(path)).absolute()
    tree["members"] = str(folder)
    if not (trusted or _all_trusted or folder in _trusted):
        message = f"{folder} holds code, which only run, stage and resume import unasked"
        hint = f"read it, then add --trust-members, or set {VARIABLE}=1 where recipes are your own"
        return Problem("members", message, hint)
    try:
        registry.use_members(folder)
    except UsageError as error:
        return Problem("members", error.message.removeprefix("members: "), error.hint)
    _trusted.add(folder)
    return None
