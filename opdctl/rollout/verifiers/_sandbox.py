"""Run Python that a model wrote, under limits, in processes of its own. Linux only.

A solution is limited in seconds of CPU and of wall clock, address space, size of files and number
of processes; it has an empty environment and a folder of its own that is removed afterwards. If the
kernel grants namespaces (as root, or to users), it also has no network, sees no other processes,
and its root holds nothing but Python and the system's libraries, read only: ``Sandbox.isolated``.
This guards a training run against the programs a model may write, not against attacks on the
kernel.
"""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import IO

from opdctl.errors import UsageError
from opdctl.rollout.verifiers._jail import JAIL

SPARE = 30.0  # seconds that starting and clearing up may take beside the solution
SHOWN = 1 << 20  # bytes of output that are read


@dataclass(frozen=True)
class Limits:
    """The limits of one solution; ``wall`` seconds pass while it sleeps, too."""

    seconds: int = 5
    wall: float = 15.0
    memory_mib: int = 1024
    file_mib: int = 16
    disk_mib: int = 64
    processes: int = 16


@dataclass(frozen=True)
class Ending:
    """The way a solution ended.

    Attributes:
        passed: all tests ran to their end; False without tests.
        clean: it ended by itself, with no error and in time.
        output: the first MiB of its output.
    """

    passed: bool
    clean: bool
    late: bool
    isolated: bool
    output: str


class Sandbox:
    """A sandbox that runs solutions, one process tree each; may be used from several threads.

    Attributes:
        isolated: solutions see no network, no files and no other processes.
    """

    def __init__(self, limits: Limits, namespaces: bool = True, python: str = "") -> None:
        """Prepare to run solutions under these limits.

        Args:
            python: the interpreter; this one if empty.
            namespaces: False leaves the kernel's namespaces out.

        Raises:
            UsageError: Python does not run under these limits here; says why.
        """
        self.limits, self.namespaces = limits, namespaces
        self.python = python or sys.executable
        if sys.platform != "linux":
            raise UsageError("solutions run in a sandbox on Linux only", "verifier: python")
        seen = self.run("import json, math, random\nprint(json.dumps([1]))")
        fine = self.run("x = 1", tests=["assert x == 1"]).passed
        if not (seen.output == "[1]\n" and seen.clean and fine):
            raise UsageError(
                f"the sandbox cannot run {self.python}: a program of two lines does not end well",
                "more memory_mib or seconds; or another python, whose files all users can read",
            )
        self.isolated = seen.isolated

    def run(self, solution: str, *, tests: list[str] | None = None, stdin: str = "") -> Ending:
        """Run one solution to its end.

        Args:
            tests: Python that runs after the solution, in sight of its names; it is sent when the
                solution has been loaded. None runs the solution as a script.
            stdin: its standard input.

        Raises:
            OSError: no process can be started.
            RuntimeError: the sandbox broke down, whatever the solution.
        """
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
            tempfile.TemporaryFile() as entered,
            tempfile.TemporaryFile() as printed,
        ):
            entered.write(stdin.encode("utf-8", "replace"))
            entered.seek(0)
            ours, theirs = socket.socketpair()
            with ours, theirs:
                process = self._start(folder, theirs, entered, printed)
                theirs.close()
                ours.settimeout(self.limits.wall + SPARE)
                passed = self._converse(ours, solution, tests)
            report = self._report(process)
            printed.seek(0)
            output = printed.read(SHOWN).decode("utf-8", "replace")
        clean = report["code"] == 0
        return Ending(passed and clean, clean, report["late"], report["isolated"], output)

    def _start(self, folder: str, control: socket.socket, entered: IO, printed: IO):
        files = {"control": control, "input": entered, "output": printed}
        numbers = {name: file.fileno() for name, file in files.items()}
        keys = {"folder": folder, "namespaces": self.namespaces, **numbers, **vars(self.limits)}
        return subprocess.Popen(
            [self.python, "-I", "-X", "utf8", "-c", JAIL, json.dumps(keys)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd=folder,
            pass_fds=tuple(numbers.values()),
            start_new_session=True,
        )

    def _converse(self, ours: socket.socket, solution: str, tests: list[str] | None) -> bool:
        """Return True if the token came back, which only the end of the tests sends."""
        token = secrets.token_hex(16)
        try:
            _send(ours, {"solution": solution, "script": tests is None})
            if tests is None or ours.recv(6, socket.MSG_WAITALL) != b"loaded":
                return False
            _send(ours, {"tests": tests, "token": token})
            said = ours.recv(len(token) + 1, socket.MSG_WAITALL)
            return secrets.compare_digest(said, token.encode())
        except (OSError, TimeoutError):  # it ended, or never answered
            return False

    def _report(self, process: subprocess.Popen) -> dict:
        try:
            said, errors = process.communicate(timeout=self.limits.wall + SPARE)
        except subprocess.TimeoutExpired:
            process.kill()  # what it started ends with it
            process.communicate()
            raise RuntimeError("the sandbox did not end a solution in time") from None
        try:
            report = json.loads(said)
        except ValueError:
            cause = errors.decode("utf-8", "replace").strip()[-300:]
            raise RuntimeError(f"the sandbox broke down: {cause}") from None
        if report["code"] == 70:
            cause = errors.decode("utf-8", "replace").strip()[-300:]
            raise RuntimeError(f"the sandbox cannot be set up: {cause}")
        if not report["cleared"]:
            raise RuntimeError("the sandbox left processes behind")
        return report


def _send(to: socket.socket, content: dict) -> None:
    text = json.dumps(content).encode()
    to.sendall(len(text).to_bytes(8, "big") + text)
