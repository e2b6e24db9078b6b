"""A user's function, named by module or file: ``package.module:name``, ``checks.py:name``.

It runs in the stage's process as trusted code, without a limit: naming it in a recipe is running
it. It is called by keyword, ``name(prompt=, response=, answer=, row=)``, and returns a number from
0 to 1, or a bool. A reward is that number; an evaluation counts the answers with exactly 1.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from opdctl.config.schema import REQUIRED, key
from opdctl.errors import Problem, UsageError
from opdctl.rollout.verifiers._verifier import SingleAnswerVerifier


class Python(SingleAnswerVerifier):
    """A Python function of one's own, by import path or file."""

    revision = 1

    @dataclass(kw_only=True)
    class Config:
        """The keys of a function."""

        call: str = key(REQUIRED, "package.module:function, or path/to/file.py:function")
        columns: list[str] = key([], "columns of the data that it is given as row")

        def __post_init__(self) -> None:
            if not isinstance(self.call, str):
                return  # missing, or no text: reported with the recipe's other problems
            where, _, name = self.call.rpartition(":")
            if where.endswith(".py"):  # a run may be resumed from another folder
                self.call = f"{Path(where).expanduser().absolute()}:{name}"

    @staticmethod
    def needs_answer(config) -> bool:
        """Return False: the function may do without."""
        return False

    @staticmethod
    def item(config, row: dict) -> dict:
        """Return the columns of a row that the function gets.

        Raises:
            KeyError: the row lacks a column.
        """
        return {name: row[name] for name in config.columns}

    @staticmethod
    def problems(config) -> list[Problem]:
        """Return what the schema cannot check of the keys; imports nothing."""
        where, _, name = config.call.rpartition(":")
        if not where or not name.isidentifier():
            return [
                Problem("call", f"{config.call!r} names no function", "package.module:function")
            ]
        if where.endswith(".py") and not os.path.isfile(where):
            return [Problem("call", f"no file {where}", "path/to/file.py:function")]
        return []

    @staticmethod
    def files(config) -> list[str]:
        """Return the function's file, for the record of a stage's inputs."""
        where = config.call.rpartition(":")[0]
        return [where] if where.endswith(".py") else []

    def __init__(self, config, ctx, domain: str) -> None:
        super().__init__(config, ctx, domain)
        self.function = load_function(config.call, f"data.{domain}.verifier.python.call")

    def grade(self, prompt, answer: str) -> float:
        """Return the function's number.

        Raises:
            ValueError: it returned no number from 0 to 1.
        """
        row = {k: v for k, v in prompt.item.items() if k != "answer"}
        number = self.function(prompt=prompt.text, response=answer, answer=prompt.answer, row=row)
        if not isinstance(number, bool | int | float) or not 0 <= number <= 1:
            raise ValueError(f"{self.config.call} gave {number!r:.80}, no number from 0 to 1")
        return number


def load_function(path: str, where: str):
    """Return the function that an import path names.

    Args:
        where: the recipe key of the path, for messages.

    Raises:
        UsageError: it cannot be imported, or is no function; says why.
    """
    place, _, name = path.rpartition(":")
    try:
        if place.endswith(".py"):
            alias = "opdctl_call_" + hashlib.blake2b(place.encode(), digest_size=8).hexdigest()
            spec = importlib.util.spec_from_file_location(alias, Path(place))
            module = importlib.util.module_from_spec(spec)
            sys.modules[alias] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        attribute = getattr(module, name)
    except Exception as error:  # a user's module may raise anything
        hint = "is it installed, or in a file: path/to/file.py:function"
        raise UsageError(f"{where}: {path}: {type(error).__name__}: {error}", hint) from error
    if not callable(attribute):
        raise UsageError(f"{where}: {path} is no function", "package.module:function")
    return attribute
