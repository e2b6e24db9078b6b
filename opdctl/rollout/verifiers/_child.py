"""A function in a process of its own, called over pipes, one call at a time, with a time limit.

It is for trusted code that may hang or grow on a model's text. It does not guard against malice:
see ``_sandbox.py``. The process starts at the first call, and again after it had to be ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

START = 120.0  # seconds it may take to import what it needs
MAIN = "from opdctl.rollout.verifiers._child import serve; serve()"


class Child:
    """A child process that runs ``module.function``. Arguments and results are plain JSON."""

    def __init__(
        self,
        module: str,
        function: str,
        seconds: float,
        memory_mib: int,
        first: tuple[Any, ...],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Start a child that answers calls of one function.

        Args:
            seconds: the most that one call may take.
            memory_mib: most address space of the process.
            first: arguments of a call at its start, so that imports do not count in a call's time.
            check: called while waiting; may raise.
        """
        self.what, self.seconds, self.check = [module, function, memory_mib], seconds, check
        self.first = first
        self.process: subprocess.Popen | None = None

    def ask(self, *arguments: Any) -> Any:
        """Call the function and return its result.

        Raises:
            TimeoutError: it did not return in time; its process was ended.
            RuntimeError: it raised, with its message; or its process died.
        """
        if self.process is None or self.process.poll() is not None:
            self._start()
        reply = self._exchange(arguments, self.seconds)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["value"]

    def _start(self) -> None:
        root = str(Path(__file__).parents[3])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", MAIN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        self.buffer = b""
        self.finalizer = weakref.finalize(self, _end, self.process)
        self._exchange(self.what, START)
        self._exchange(self.first, START)

    def _exchange(self, content: Any, seconds: float) -> dict:
        try:
            self.process.stdin.write(json.dumps(content).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._dead() from None
        deadline, out = time.monotonic() + seconds, self.process.stdout.fileno()
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                self.finalizer()
                raise TimeoutError(f"no verdict within {seconds:g} s")
            if select.select([out], [], [], min(left, 0.2))[0]:
                more = os.read(out, 65536)
                if not more:
                    raise self._dead()
                self.buffer += more
            try:
                self.check()
            except BaseException:
                self.finalizer()
                raise
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def _dead(self) -> RuntimeError:
        self.finalizer()
        return RuntimeError(f"its process ended with code {self.process.returncode}")


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def serve() -> None:
    """Answer calls until the pipe closes, in the child; the function's output is discarded."""
    questions, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its parent
    module, name, memory_mib = json.loads(questions.readline())
    function = getattr(importlib.import_module(module), name)
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20,) * 2)
    replies.write(b"{}\n")
    replies.flush()
    for line in questions:
        try:
            reply = {"value": function(*json.loads(line))}
        except Exception as error:  # reported to who asked
            reply = {"error": f"{type(error).__name__}: {error!s:.300}"}
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()
