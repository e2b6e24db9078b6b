"""Values of a table as the text that their file spells, and the text that no tokenizer reads.

A number keeps its digits: 0.00001, 1.50 and 1e5 in JSON are these characters. Parquet and Arrow
keep no spelling: there, a float is its shortest decimal that reads back as the same float, without
an exponent. ``math`` and ``exact`` compare with what the row says, so it must not be rewritten.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any

SURROGATE = re.compile("[\ud800-\udfff]")


class SpelledFloat(float):
    """A float that remembers the text it was read from."""

    text: str

    def __new__(cls, text: str, value: float | None = None) -> SpelledFloat:
        number = super().__new__(cls, text if value is None else value)
        number.text = text
        return number


def read_json(line: bytes) -> Any:
    """Return a JSON value whose floats remember their spelling.

    Raises:
        ValueError: it is no JSON, or an object has a key twice, of which one would be lost.
        RecursionError: it is nested too deep.
    """
    return json.loads(line, parse_float=SpelledFloat, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.60} stands twice in one object")
    return values


def spelled(value: Any) -> str | None:
    """Return a cell as text; None if it holds none: nothing, NaN, infinity, a list, a date."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, SpelledFloat):
        return value.text if math.isfinite(value) else None
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float | Decimal) and math.isfinite(value):
        return f"{value if isinstance(value, Decimal) else Decimal(repr(float(value))):f}"
    return None


def narrow_floats(rows: Iterable[dict], types: dict[str, str]) -> Iterator[dict]:
    """Yield rows whose floats of few bits are spelled as such: .1, and not .10000000149.

    Args:
        rows: with these floats widened to 64 bits, as Arrow gives them.
        types: ``float16`` or ``float32`` of each column that is as narrow.
    """
    import numpy as np

    for row in rows:
        for name, kind in types.items():
            value = row[name]
            if isinstance(value, float) and math.isfinite(value):
                row[name] = SpelledFloat(f"{Decimal(str(np.dtype(kind).type(value))):f}", value)
        yield row


def lone_surrogate(value: Any) -> str:
    """Return what stands around the first half of a surrogate pair, escaped; "" if there is none.

    JSON can spell one, as in a text that was cut inside of an emoji; no encoding can write it.
    """
    if isinstance(value, str):
        half = SURROGATE.search(value)
        return ascii(value[max(0, half.start() - 20) : half.end() + 20]) if half else ""
    if isinstance(value, dict):
        value = [part for pair in value.items() for part in pair]
    if isinstance(value, list | tuple):
        return next(filter(None, map(lone_surrogate, value)), "")
    return ""
