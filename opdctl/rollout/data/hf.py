"""Prompts from a Hugging Face data set: a public name, or a folder that ``save_to_disk`` wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, did_you_mean, key
from opdctl.config.shards import WILD
from opdctl.errors import Problem, UsageError
from opdctl.rollout.data._nested import arrow_row
from opdctl.rollout.data._spelling import narrow_floats
from opdctl.rollout.data._tables import ColumnKeys, TableData
from opdctl.rollout.split import Split


class Hf(TableData):
    """A Hugging Face data set, by name or local folder, with column names as keys."""

    revision = 2

    @dataclass(kw_only=True)
    class Config(ColumnKeys):
        """The keys of a Hugging Face domain."""

        path: str = key(REQUIRED, "public name, or a folder written by save_to_disk")
        subset: str = key("", "configuration of the data set, where it has several")
        split: str = key("train", "its split")
        revision: str = key(
            "", "commit, tag or branch of a public one; empty: the newest", neutral=True
        )

    @staticmethod
    def problems(config) -> list[Problem]:
        """Return what the schema cannot check of the domain's keys."""
        if os.path.isdir(config.path) and (config.revision or config.subset):
            name = "revision" if config.revision else "subset"
            message = f"{config.path} is a folder, which has no {name}"
            return [Problem(name, message, "leave it out, or name a public data set")]
        if any(mark in config.path for mark in WILD):
            message = f"{config.path} is a pattern of files, and a data set is named here"
            return [Problem("path", message, "kind: jsonl reads .jsonl and .parquet files")]
        return []

    @property
    def public(self) -> bool:
        """A flag: the data set is a public name, whose rows may be others tomorrow."""
        return not os.path.isdir(self.config.path)

    def rows(self, split: Split) -> Iterator[dict]:
        """Yield the rows of the data set.

        Raises:
            UsageError: the data set cannot be loaded; says why.
        """
        import datasets

        config = self.config
        try:
            if os.path.isdir(config.path):
                table = datasets.load_from_disk(config.path)
                if isinstance(table, datasets.DatasetDict):
                    if config.split not in table:
                        near = did_you_mean(config.split, table, "splits:")
                        message = f"data.{self.domain}.split: no split {config.split!r}"
                        raise UsageError(f"{message} in {config.path}", near)
                    table = table[config.split]
            else:
                table = datasets.load_dataset(
                    config.path,
                    config.subset or None,
                    split=config.split,
                    revision=config.revision or None,
                    streaming=config.stream,  # row by row, without a copy of the whole
                )
            types = {n: getattr(f, "dtype", "") for n, f in (table.features or {}).items()}
            narrow = {n: kind for n, kind in types.items() if kind in ("float16", "float32")}
            yield from narrow_floats(map(arrow_row, table), narrow)
        except UsageError:
            raise
        except Exception as error:  # files of a stranger make datasets raise anything
            cause = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
            raise UsageError(
                f"data.{self.domain}.path: cannot load {config.path}: {cause}",
                "a public name, or a folder that save_to_disk wrote; split names one of its splits;"
                " files in a folder: kind: jsonl, path: FOLDER/*.parquet",
            ) from None
