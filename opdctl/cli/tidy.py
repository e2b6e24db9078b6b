"""``opdctl tidy``: remove what a kill left in a run directory."""

from __future__ import annotations

import contextlib

from opdctl.cli.options import DirArg, Json


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
