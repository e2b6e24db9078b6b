"""Prompts from a file of one's own: JSON lines or parquet, with column names as keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from opdctl.core.questions import Split
from opdctl.data._tables import ColumnKeys, TableData
from opdctl.errors import Problem, UsageError
from opdctl.schema import REQUIRED, key


class Jsonl(TableData):
    """A .jsonl or .parquet file, with column names as keys."""

    revision = 1

    @dataclass(kw_only=True)
    class Config(ColumnKeys):
        """Keys of a file domain."""

        path: str = key(REQUIRED, "file; .parquet is read as parquet, anything else as JSON lines")

    @staticmethod
    def problems(config) -> list[Problem]:
        """What the schema cannot see."""
        if Path(config.path).is_file():
            return []
        return [Problem("path", f"no file {config.path}", "a .jsonl or .parquet file")]

    def rows(self, split: Split) -> Iterator[dict]:
        """Rows of the file.

        Raises:
            UsageError: no such file, or a line that is not a JSON object; says which.
        """
        path = Path(self.config.path).expanduser()
        if not path.is_file():
            raise UsageError(f"data.{self.domain}.path: no file {path}")
        if path.suffix == ".parquet":
            yield from parquet_rows(path, self.domain)
            return
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:  # not UTF-8 is one too
                    raise UsageError(f"{path}:{number}: not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise UsageError(f"{path}:{number}: expected an object")
                yield row


def parquet_rows(path: Path, domain: str) -> Iterator[dict]:
    """Rows of a parquet file, a batch at a time."""
    import pyarrow
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"data.{domain}.path: {path} is not parquet: {error}") from None
