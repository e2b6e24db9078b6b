"""Nested objects of rows: the same from JSON lines, from parquet and from a saved data set.

Arrow keeps the objects of a column as one structure: it has every key that any of them has, in the
order in which the rows first have them. So an object comes back with nulls, and perhaps in another
order than it was written in. Neither can be undone there; here the objects of JSON lines get the
same order, and no object has a null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opdctl.models.chat.messages import without_nulls


class KeyOrder:
    """The order of the keys of all objects at one place: that in which the rows first have them."""

    def __init__(self) -> None:
        self.keys: dict[str, tuple[int, KeyOrder]] = {}
        self.items: KeyOrder | None = None

    def sort(self, value: Any) -> Any:
        """Return a value with the keys of its objects in order; keys that are new are the last."""
        if isinstance(value, Mapping):
            for key in value:
                if key not in self.keys:
                    self.keys[key] = len(self.keys), KeyOrder()
            names = sorted(value, key=lambda name: self.keys[name][0])
            return {name: self.keys[name][1].sort(value[name]) for name in names}
        if isinstance(value, list):
            self.items = self.items or KeyOrder()
            return [self.items.sort(item) for item in value]
        return value


def arrow_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of an Arrow table with its columns, and no null inside of them."""
    return {column: without_nulls(value) for column, value in row.items()}
