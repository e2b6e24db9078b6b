"""Prompts from a Hugging Face data set: a public name, or a folder that ``save_to_disk`` wrote."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from opdctl.core.questions import Split
from opdctl.data._tables import ColumnKeys, TableData
from opdctl.errors import UsageError
from opdctl.schema import REQUIRED, key


class Hf(TableData):
    """A Hugging Face data set, by name or local folder, with column names as keys."""

    revision = 1

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
            if Path(config.path).is_dir():
                found = datasets.load_from_disk(config.path)
                if isinstance(found, datasets.DatasetDict):
                    found = found[config.split]
            else:
                found = datasets.load_dataset(
                    config.path, config.subset or None, split=config.split
                )
        except (OSError, ValueError, KeyError, ConnectionError) as error:
            what = str(error).strip().split("\n")[0]
            raise UsageError(f"data.{self.domain}: cannot load {config.path}: {what}") from None
        yield from found
