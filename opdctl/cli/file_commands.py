"""The commands that write or remove files: cp, new and tidy."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from opdctl.cli.options import DirArg, Json


def cp(
    name: Annotated[str, typer.Argument(help="a shipped recipe or method")],
    dest: Annotated[Path, typer.Argument(help="the file to write")],
) -> None:
    """Copy a shipped recipe or method, comments and all, to change it."""
    from opdctl.cli.catalogue import copy

    print(copy(name, dest))


def new(
    family: Annotated[str, typer.Argument(help="signal, objective, weight, verifier, data, ...")],
    name: Annotated[str, typer.Argument(help="small letters, digits and _")],
    folder: Annotated[Path, typer.Option("--in", help="the folder of members")] = Path(
        "my_members"
    ),
) -> None:
    """Begin a member of your own: a file that works, and its test."""
    from opdctl.cli.new import new_member

    for line in new_member(family, name, folder):
        print(line)


def tidy(directory: DirArg, as_json: Json = False) -> None:
    """Remove checkpoints, logs and part files that no record of a run needs any more."""
    from opdctl.cli import console
    from opdctl.estimate.memory import format_bytes
    from opdctl.run.rundir import RunDir, lock
    from opdctl.run.tidy import tidy as remove

    parent = RunDir(directory)
    freed = {}
    with contextlib.ExitStack() as stack:
        places = {run.path: run for run in (parent, *parent.runs())}
        for path in places:
            stack.enter_context(lock(path / ".lock", str(path)))
        for path, run in places.items():
            freed[str(path)] = remove(run)
    if as_json:
        console.emit_json({"freed": freed})
    else:
        print(f"{format_bytes(sum(freed.values()))} freed in {parent.path}")
