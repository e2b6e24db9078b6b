"""Standard streams that may go away: a run goes on without its terminal and its log.

A terminal that is closed, a pipe whose reader has ended and a disk that is full make every write an
error. For a command that answers a question that error is right. A run has its result on disk, and
what it would have printed is no reason to end it.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

from opdctl.config.secrets import masked


class _Tolerant(io.FileIO):
    """A descriptor whose writes are dropped where they fail."""

    def write(self, content, /) -> int:
        try:
            return super().write(content)
        except OSError:
            return len(content)


class _Masked(io.TextIOWrapper):
    """A text stream that shows no key: a server may repeat one in what it answers."""

    def write(self, text, /) -> int:
        return super().write(masked(text))


def tolerant(stream: TextIO) -> TextIO:
    """Return a stream on the same descriptor that drops what cannot be written, and keys."""
    try:
        raw = _Tolerant(stream.fileno(), "w", closefd=False)
    except OSError:
        return stream  # a stream of a test, or of a program that calls this one
    buffer = io.BufferedWriter(raw)
    return _Masked(buffer, encoding=stream.encoding, errors="backslashreplace", line_buffering=True)


def open_closed_streams() -> None:
    """Open the null device for each standard stream that is closed.

    The next file to be opened would get its number, and take what is printed there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null == number:
                os.set_inheritable(number, True)
            else:
                os.dup2(null, number)
                os.close(null)
            mode = "r" if number == 0 else "w"
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def outlive_the_terminal() -> None:
    """Let this process go on where its standard output or error can no longer be written."""
    sys.stdout.flush()
    sys.stdout, sys.stderr = tolerant(sys.stdout), tolerant(sys.stderr)
