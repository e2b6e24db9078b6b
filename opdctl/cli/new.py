"""``opdctl new``: a working member of one's own and its test, as copies of ``skeletons/``.

A skeleton is a member like any other, called ``skeleton``, so it is checked as the package is.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from opdctl.config.member_files import CONTRACTS, class_name
from opdctl.config.registry import FAMILIES, shipped
from opdctl.config.schema import did_you_mean
from opdctl.errors import UsageError


def new_member(family: str, name: str, folder: Path) -> list[str]:
    """Write ``folder/FAMILY/NAME.py`` and ``folder/tests/test_NAME.py``. Returns lines to print:
    the files, the test's command and how a recipe takes the folder.

    Raises:
        UsageError: no such family, or one that is opdctl's own; the name is none, or taken; a file
            is there already, or cannot be written.
    """
    family = _family(family)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "skeleton":
        raise UsageError(f"{name!r:.80} is not the name of a member", "small letters, digits and _")
    if name in shipped(family):
        hint = f"another name; `opdctl show {family}/{name}` shows it"
        raise UsageError(f"opdctl has a member {name!r} in {family}", hint)
    skeletons = resources.files("opdctl") / "cli" / "skeletons"
    files = {
        folder / family / f"{name}.py": skeletons / f"{family}.py",
        folder / "tests" / f"test_{name}.py": skeletons / f"check_{family}.py",
    }
    for file in files:
        if file.exists():
            raise UsageError(f"{file} exists", "another name, or --in DIR")
    for file, skeleton in files.items():
        text = skeleton.read_text(encoding="utf-8").replace("Skeleton", class_name(name))
        text = text.replace("skeleton", name).replace("./my_members", _as_written(folder))
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write {file}: {error.strerror}", "--in DIR") from None
    written, test = files
    return [
        str(written),
        str(test),
        f"try it:  python -m pytest {test}",
        f"use it:  members: {_as_written(folder)}    in a recipe, or behind a command as "
        f"members={_as_written(folder)}",
    ]


def _family(word: str) -> str:
    """The family that a word names, in the singular or the plural.

    Raises:
        UsageError: none, or one whose members are all opdctl's.
    """
    names = {name.removesuffix("s"): name for name in FAMILIES} | {name: name for name in FAMILIES}
    own = [name.removesuffix("s") for name in CONTRACTS]
    if word not in names:
        raise UsageError(f"no family {word!r:.80}", did_you_mean(word, own, "one of"))
    if names[word] not in CONTRACTS:
        message = f"members of {names[word]} are opdctl's own: none can be added from outside"
        raise UsageError(message, f"one of {', '.join(own)}")
    return names[word]


def _as_written(folder: Path) -> str:
    """A folder as a recipe beside it names it."""
    return str(folder) if folder.is_absolute() else f"./{folder}"
