"""A cache that keeps the newest values: a stream never stops bringing new prompts."""

from __future__ import annotations

from typing import Any

CACHE_LIMIT = 2**21  # ids, or characters, that a cache keeps


class RecentCache(dict):
    """A cache of the newest values, dropping old ones while their lengths exceed CACHE_LIMIT."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def keep(self, key: Any, value: Any) -> Any:
        """Add a value and return it; the oldest values make room."""
        self[key] = value
        self.length += len(value)
        while self.length > CACHE_LIMIT and len(self) > 1:
            self.length -= len(self.pop(next(iter(self))))
        return value
