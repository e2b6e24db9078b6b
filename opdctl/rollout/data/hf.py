"""Prompts from a Hugging Face data set: a public name, or a folder that ``save_to_disk`` wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, did_you_mean, key
from opdctl.config.shards import WILD
from opdctl.errors import Problem, UsageError
from opdctl.rollout.data._tables import ColumnKeys, TableData
from opdctl.rollout.split import Split


class Hf(TableData):
    """A Hugging Face data set, by name or local folder, with column names as keys."""

    revision = 2

    @dataclass(kw_only=True)
    class Config(ColumnKeys):
        """Keys of a Hugging Face domain."""

        path: str = key(REQUIRED, "public name, or a folder written by save_to_disk")
        subset: str = key("", "configuration of the data set, where it has several")
        split: str = key("train", "its split")
        revision: str = key(
            "", "commit, tag or branch of a public one; empty: the newest", neutral=True
        )

    @staticmethod
    def problems(config) -> list[Problem]:
        """What the schema cannot see."""
        if os.path.isdir(config.path) and (config.revision or config.subset):
            name = "revision" if config.revision else "subset"
            what = f"{config.path} is a folder, which has no {name}"
            return [Problem(name, what, "leave it out, or name a public data set")]
        if any(mark in config.path for mark in WILD):
            what = f"{config.path} is a pattern of files, and a data set is named here"
            return [Problem("path", what, "kind: jsonl reads .jsonl and .parquet files")]
        return []

    @property
    def public(self) -> bool:
        """Whether it is a name, behind which there may be other rows tomorrow."""
        return not os.path.isdir(self.config.path)

    def rows(self, split: Split) -> Iterator[dict]:
        """Rows of the data set.

        Raises:
            UsageError: it cannot be loaded; says why.
        """
        import datasets

        config = self.config
        try:
            if os.path.isdir(config.path):
                found = datasets.load_from_disk(config.path)
                if isinstance(found, datasets.DatasetDict):
                    if config.split not in found:
                        near = did_you_mean(config.split, found, "splits:")
                        what = f"data.{self.domain}.split: no split {config.split!r}"
                        raise UsageError(f"{what} in {config.path}", near)
                    found = found[config.split]
            else:
                found = datasets.load_dataset(
                    config.path,
                    config.subset or None,
                    split=config.split,
                    revision=config.revision or None,
                    streaming=config.stream,  # row by row, without a copy of the whole
                )
            yield from found
        except UsageError:
            raise
        except Exception as error:  # files of a stranger make datasets raise anything
            what = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
            raise UsageError(
                f"data.{self.domain}.path: cannot load {config.path}: {what}",
                "a public name, or a folder that save_to_disk wrote; split names one of its splits;"
                " files in a folder: kind: jsonl, path: FOLDER/*.parquet",
            ) from None
