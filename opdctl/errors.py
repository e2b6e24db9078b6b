"""The errors a user can meet: one family, each with an exit code and a hint.

Leaves out programming errors: those stay assertions and tracebacks.
"""

from __future__ import annotations

from dataclasses import dataclass

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_PENDING = 3
EXIT_BUSY = 4
EXIT_INTERRUPTED = 75
SHOWN = 100  # problems of one recipe


class OpdctlError(Exception):
    """A failure to report without a traceback.

    Args:
        message: what is wrong and where.
        hint: what to type next; may be empty.
    """

    exit_code = EXIT_FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UsageError(OpdctlError, ValueError):
    """Bad input from the user: nothing was started, nothing was changed."""

    exit_code = EXIT_USAGE


class BusyError(OpdctlError):
    """The run directory or the stage is held by another process."""

    exit_code = EXIT_BUSY


class StageFailed(OpdctlError):
    """A stage ended with an error; its log says which."""


class Interrupted(OpdctlError):
    """A stop was asked for and the state up to it is committed."""

    exit_code = EXIT_INTERRUPTED


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe.

    Attributes:
        path: dotted key, such as ``stages.mopd.teachers.math``.
        message: what is wrong with it.
        hint: what to type instead; may be empty.
        where: ``file:line`` or the override it came from; may be empty.
    """

    path: str
    message: str
    hint: str = ""
    where: str = ""

    def __str__(self) -> str:
        line = f"{self.path}: {self.message:.500}" if self.path else f"{self.message:.500}"
        if self.where:
            line += f" ({self.where})"
        return f"{line}\n      {self.hint}" if self.hint else line


class Note(Problem):
    """One thing to say of a recipe that is read all the same."""


class RecipeError(UsageError):
    """Every problem of a recipe, reported at once: the first in words, all as ``problems``."""

    def __init__(self, problems: list[Problem], name: str = "recipe") -> None:
        count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
        body = "\n".join(f"  - {problem}" for problem in problems[:SHOWN])
        if len(problems) > SHOWN:
            body += f"\n  and {len(problems) - SHOWN} more"
        super().__init__(f"{name}: {count}\n{body}")
        self.problems = problems
