"""Keys of servers: where they are given, and how they are kept out of what is written.

    OPDCTL_API_KEY                     for every server that a recipe names
    OPDCTL_API_KEY_HOST_EXAMPLE_ORG    for host.example.org alone, before the other
    OPDCTL_API_KEY_LOCALHOST_8000      for one port of a host, before both

The name is that of the host in capitals, with ``_`` for all that is no letter or digit. A recipe
holds no key: it is copied into the run directory, and so would be the key.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from opdctl.errors import Problem

VARIABLE = "OPDCTL_API_KEY"
MASK = "***"
SHORTEST = 6  # characters; masking a shorter word, such as "x", would tear up what is read
USER = re.compile(r"(?<=://)[^/\s@'\"]+@")
PARAMETER = re.compile(
    r"(?<=[?&])((?:api_?|access_?)?(?:key|token)|password|secret)=[^&\s'\"]+", re.I
)


def variable_of(base: str, port: bool) -> str:
    """Return the name of the variable with the key of one host, or of one port of it."""
    parts = urlsplit(base)
    name = f"{parts.hostname}:{parts.port}" if port else str(parts.hostname)
    return f"{VARIABLE}_{re.sub('[^A-Za-z0-9]', '_', name).upper()}"


_known: set[str] = set()


def remember(key: str) -> None:
    """Add a key to those that are masked wherever this process shows or stores text."""
    if len(key) >= SHORTEST:
        _known.add(key)


def key_of(base: str) -> str:
    """Return the key of a server, by its address; empty if there is none."""
    names = (variable_of(base, True), variable_of(base, False), VARIABLE)
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def masked(text: str) -> str:
    """Return a text without the keys in use, and without credentials in the addresses it holds."""
    for key in sorted(_known, key=len, reverse=True):  # one may be part of another
        text = text.replace(key, MASK)
    text = USER.sub(f"{MASK}@", text)
    return PARAMETER.sub(lambda match: f"{match[1]}={MASK}", text)


def credentials_in(tree: Any, path: str = "") -> Iterator[Problem]:
    """Yield a problem for each text of a recipe that has credentials in an address."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from credentials_in(value, f"{path}.{name}" if path else str(name))
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            yield from credentials_in(value, f"{path}.{i}")
    elif isinstance(tree, str) and "://" in tree and masked(tree) != tree:
        message = f"an address with credentials in it: {masked(tree):.80}"
        hint = f"the address alone, and {VARIABLE}=KEY in the environment"
        yield Problem(path, message, hint)
