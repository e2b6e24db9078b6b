"""The parts that benchmarks share: a process for each case, and a check of what was measured."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def in_a_process(work: Callable, *arguments: Any, preload: Iterable[str] = ("torch",)) -> Any:
    """Return what ``work`` returns in a process of its own, which no other case has used.

    It is forked from a server that has imported ``preload`` and done nothing else, so that a case
    does not pay for the imports of the last. ``work`` is a function of a module, its arguments and
    result can be pickled.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(quietly, work, *arguments).result()


def quietly(work: Callable, *arguments: Any) -> Any:
    """Return what ``work`` returns; what it prints goes to stderr, as no part of the table."""
    with contextlib.redirect_stdout(sys.stderr):
        return work(*arguments)


def chosen_from(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return the type of an option that takes names separated by commas."""
    known = list(known)

    def names(text: str) -> list[str]:
        """Return the names in a text; argparse says what is wrong with another."""
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            message = f"{', '.join(unknown)} is none of {', '.join(known)}"
            raise argparse.ArgumentTypeError(message)
        return text.split(",")

    return names


def installed(modules: dict[str, str]) -> list[str]:
    """Return the peers whose module is installed; says on stderr which are left out.

    Args:
        modules: the module of each peer, by its name.
    """
    missing = sorted({m for m in modules.values() if not importlib.util.find_spec(m)})
    if missing:
        print(f"not installed, so not measured: {', '.join(missing)}", file=sys.stderr)
    return [name for name, module in modules.items() if module not in missing]


def check(
    rows: list[dict], count: int, positive: Iterable[str], others: Iterable[str] = ()
) -> None:
    """Refuse measurements that are incomplete.

    Args:
        rows: the measurements, a mapping each; they may have further keys.
        count: how many were to be made.
        positive: names of numbers that are above 0 in each row, as times are.
        others: names of numbers that may be 0, as memory and errors may.

    Raises:
        SystemExit: with exit code 1, and the row at fault on stderr.
    """
    if len(rows) != count:
        raise SystemExit(f"{len(rows)} rows were measured instead of {count}")
    for row in rows:
        for names, least in ((positive, math.ulp(0.0)), (others, 0.0)):
            for name in names:
                number = row.get(name, math.nan)
                if not least <= number < math.inf:
                    raise SystemExit(f"{name} is {number} in {row}")
