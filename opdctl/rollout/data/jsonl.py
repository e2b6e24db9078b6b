"""Prompts from a user's file: JSON lines or parquet, with column names as keys."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from opdctl.config.schema import REQUIRED, key
from opdctl.config.shards import shards
from opdctl.errors import Problem, UsageError
from opdctl.rollout.data._nested import arrow_row
from opdctl.rollout.data._spelling import narrow_floats, read_json
from opdctl.rollout.data._tables import ColumnKeys, TableData
from opdctl.rollout.split import Split

LONGEST = 2**24  # bytes of a line


class Jsonl(TableData):
    """A .jsonl or .parquet file, or several shards, with column names as keys."""

    revision = 2

    @dataclass(kw_only=True)
    class Config(ColumnKeys):
        """The keys of a file domain."""

        path: str = key(
            REQUIRED,
            "file, or a pattern such as data/train-*.parquet, whose files are read in the order of "
            "their names; .parquet is read as parquet, anything else as JSON lines",
        )

    @staticmethod
    def problems(config) -> list[Problem]:
        """Return what the schema cannot check of the domain's keys."""
        if shards(config.path):
            return []
        hint = "a .jsonl or .parquet file"
        if os.path.isdir(config.path):
            hint = f"the files in it: {config.path}/*.jsonl, or kind: hf for one of save_to_disk"
        return [Problem("path", f"no file {config.path}", hint)]

    def rows(self, split: Split) -> Iterator[dict]:
        """Yield the rows of the files.

        Raises:
            UsageError: there is no such file, or a line is no JSON object; says which.
        """
        files = shards(self.config.path)
        if not files:
            raise UsageError(f"data.{self.domain}.path: no file {self.config.path}")
        for path in files:
            for number, row in self._rows(path):
                self.last = f"{path}, row {number}"
                yield row

    def place(self, number: int) -> str:
        """Return file and row of the row that was read last; in JSON lines, a row is a line."""
        return self.last

    def _rows(self, path: Path) -> Iterator[tuple[int, dict]]:
        if path.suffix == ".parquet":
            yield from enumerate(parquet_rows(path, self.domain), 1)
            return
        hint = 'a line is one object, such as {"prompt": "1+1=", "answer": "2"}'
        try:
            file = open(path, "rb")  # noqa: SIM115
        except OSError as error:
            message = f"data.{self.domain}.path: cannot read {path}: {error.strerror}"
            raise UsageError(message, "its owner may let you: chmod +r") from None
        with file:
            lines = iter(lambda: file.readline(LONGEST + 1), b"")
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"data.{self.domain}.path: {path}:{number}"
                if len(line) > LONGEST:
                    raise UsageError(f"{where}: a line longer than {LONGEST} bytes", hint)
                try:
                    row = read_json(line)
                except (ValueError, RecursionError) as error:  # not UTF-8 is one too
                    raise UsageError(f"{where}: not JSON: {error}", hint) from None
                if not isinstance(row, dict):
                    raise UsageError(f"{where}: expected an object", hint)
                yield number, row


def parquet_rows(path: Path, domain: str) -> Iterator[dict]:
    """Yield the rows of a parquet file, reading a batch at a time."""
    import pyarrow
    from pyarrow import parquet

    count = 0
    try:
        file = parquet.ParquetFile(path)
        floats = [f for f in file.schema_arrow if pyarrow.types.is_floating(f.type)]
        narrow = {f.name: f"float{n}" for f in floats if (n := f.type.bit_width) <= 32}
        for batch in file.iter_batches():
            rows = batch.to_pylist(maps_as_pydicts="lossy")
            yield from narrow_floats(map(arrow_row, rows), narrow)
            count += len(batch)
    except UnicodeDecodeError as error:
        message = f"data.{domain}: {path}: a text after row {count} is not UTF-8: {error}"
        raise UsageError(message, "write the file again, from text") from None
    except (pyarrow.ArrowException, OSError) as error:
        message = f"data.{domain}.path: {path} is not parquet: {error!s:.200}"
        raise UsageError(message, "anything that is not .parquet is read as JSON lines") from None
