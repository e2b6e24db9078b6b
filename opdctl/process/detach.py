"""A run that goes on without the terminal it was started from: ``opdctl run --detach``.

The process forks before any thread or lock exists. The child leads a session of its own, so that
closing the terminal does not reach it, and prints to ``logs/detached.log`` of the run. The parent
waits until the child has begun, or says why it could not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

BEGUN = b"begun"


def detach(log: Path, message: str) -> Callable[[], None]:
    """Go on in a child process; return a function that tells the parent that all is well.

    Only the child returns. The parent ends with exit code 0 once it is told so, else with that of
    the child.

    Args:
        log: the file that the child prints to.
        message: a line that the parent prints when the child has begun.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    from_here = log.stat().st_size if log.exists() else 0
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            has_begun = pipe.read() == BEGUN
        if has_begun:
            print(message, file=sys.stderr, flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        reason = log.read_bytes()[from_here:].decode(errors="replace")
        print(reason, end="", file=sys.stderr, flush=True)
        os._exit(os.waitstatus_to_exitcode(status) or 1)
    os.close(reading)
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number, target in ((null, 0), (file, 1), (file, 2)):
        os.dup2(number, target)
    os.set_inheritable(writing, False)

    def begun() -> None:
        os.write(writing, BEGUN)
        os.close(writing)

    return begun
