"""The reading of files that somebody else may have made.

A pipe in the place of a file would hold its reader for ever, and a device has no end: only regular
files are read, up to a size that no file of the kind has.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

LARGEST_TEXT = 1 << 28  # bytes of a file that is read whole: a record, a configuration, a log


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file to read its bytes.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe, a socket or a device.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(number, "rb")


def read_bytes(path: str | Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: it cannot be read, or is larger than ``LARGEST_TEXT``.
    """
    with open_regular(path) as file:
        content = file.read(LARGEST_TEXT + 1)
    if len(content) > LARGEST_TEXT:
        raise OSError(errno.EFBIG, f"larger than {LARGEST_TEXT} bytes", str(path))
    return content


def read_text(path: str | Path) -> str:
    """Return the text of a regular file in UTF-8.

    Raises:
        OSError: it cannot be read, or is too large.
        UnicodeDecodeError: it is not UTF-8.
    """
    return read_bytes(path).decode("utf-8")
