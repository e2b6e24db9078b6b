"""Prompts from a Hugging Face data set: a public name, or a folder that ``save_to_disk`` wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from opdctl.core.questions import Split
from opdctl.data._tables import ColumnKeys, TableData
from opdctl.errors import UsageError
from opdctl.schema import REQUIRED, key


class Hf(TableData):
    """A Hugging Face data set, by name or local folder, with column names as keys."""

    revision = 2

    @dataclass(kw_only=True)
    class Config(ColumnKeys):
        """Keys of a Hugging Face domain."""

        path: str = key(REQUIRED, "public name, or a folder written by save_to_disk")
        subset: str = key("", "configuration of the data set, where it has several")
        split: str = key("train", "its split")

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
                    found = found[config.split]
            else:
                found = datasets.load_dataset(
                    config.path, config.subset or None, split=config.split
                )
            yield from found
        except Exception as error:  # files of a stranger make datasets raise anything
            what = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
            raise UsageError(
                f"data.{self.domain}.path: cannot load {config.path}: {what}",
                "a public name, or a folder that save_to_disk wrote; split names one of its splits",
            ) from None
