"""The folders that Python imports from: the working directory is none of them.

A file ``yaml.py`` in a folder of data or models that somebody else made must not be run because a
command was started there. ``opdctl``, the program, never looks there itself. Python does so for
``python -m`` and ``python -c``, and multiprocessing starts its servers by the latter.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])  # the folder that holds the package


def close_working_directory() -> None:
    """Take the working directory off the path of this process and of all that it starts.

    A folder that ``PYTHONPATH`` names stays, the working directory too if it is named there in
    full; an empty entry, which also stands for it, goes.
    """
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    named = [entry for entry in entries if entry]
    try:
        here = os.getcwd()
    except FileNotFoundError:  # removed meanwhile: nothing can be imported from it
        here = ""
    explicit = {os.path.abspath(entry) for entry in named}
    if here == ROOT and ROOT not in explicit:  # a checkout that is not installed
        named.append(ROOT)
        explicit.add(ROOT)
    if named != entries:
        os.environ["PYTHONPATH"] = os.pathsep.join(named)
    os.environ["PYTHONSAFEPATH"] = "1"
    if here not in explicit:
        sys.path[:] = [entry for entry in sys.path if entry not in ("", here)]
