"""What to type after a diagnosis: whole commands, with the data and the keys that were given.

Of a pair named on the command line they are stages of their own, ``opdctl stage``; of a stage of a
recipe or a run they are ``opdctl run`` of that stage with other keys. Pure; no torch.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from opdctl.recipe.resolution import TOP
from opdctl.recipe.yaml_lines import parse_value


@dataclass(frozen=True)
class Commands:
    """Of one teacher, as words of a command line.

    Attributes:
        diagnosed: the diagnosis again, but for ``--prompts``.
        prompts: of each domain, as it was.
        distil: what runs the opd stage; keys of it come last.
        before: what stands in front of these keys.
        cold: an sft stage of the student on the teacher's samples; empty where it cannot be named.
    """

    diagnosed: tuple[str, ...]
    prompts: int
    distil: tuple[str, ...]
    before: str = ""
    cold: tuple[str, ...] = ()

    def again(self) -> str:
        """With four times the prompts."""
        return shlex.join([*self.diagnosed, "--prompts", str(4 * self.prompts)])

    def opd(self, signals: str, objectives: str) -> str:
        """With these signals and objectives, both as written in a recipe."""
        keys = {"signals": signals, "objectives": objectives}
        return shlex.join([*self.distil, *(f"{self.before}{k}={v}" for k, v in keys.items())])

    def as_is(self) -> str:
        """The opd stage with the signals that it has."""
        return shlex.join(self.distil)

    def sft(self) -> list[str]:
        """At most one line."""
        return [shlex.join(self.cold)] if self.cold else []


def effort_words(effort: dict[str, int]) -> list[str]:
    """What a diagnosis may cost, but for its prompts."""
    return [word for k, v in effort.items() if k != "prompts" for word in (f"--{k}", str(v))]


def of_pair(
    entry: dict[str, Any],
    name: str,
    student: str,
    teachers: Iterable[str],
    data: dict[str, dict[str, dict]],
    overrides: Iterable[str],
    effort: dict[str, int],
) -> Commands:
    """Of a teacher named with ``--teacher``: commands for it alone, on its domains.

    Args:
        entry: what was measured of it.
        data: the entries that each ``--data`` meant.
    """
    overrides = tuple(overrides)
    words = [word for t in teachers for word in ("--teacher", t)]
    words = ["--student", student, *words, *(word for d in data for word in ("--data", d))]
    again = ("opdctl", "diagnose", *words, *overrides, *effort_words(effort))
    model = entry["model"]
    pair = ("--student", student, "--teacher", model if name == "teacher" else f"{name}={model}")
    entries = {domain: keys for found in data.values() for domain, keys in found.items()}
    prompts = [
        f"data.{domain}.{key}={_plain(value)}"
        for domain in entry["domains"]
        for key, value in entries.get(domain, {}).items()
        if value is not None
    ]
    short = [o.removeprefix("stages.opd.") for o in overrides]
    mine = [o for o in short if _about(o, name, entry["domains"])]
    whose = [(o.split("=")[0].split(".")[0], o) for o in mine]
    taught = [f"sources.teacher.{o}" for first, o in whose if first == "sampling"]
    taught += [o for first, o in whose if first in TOP]
    return Commands(
        again,
        effort["prompts"],
        ("opdctl", "stage", "opd", *pair, *prompts, *mine),
        cold=("opdctl", "stage", "sft", *pair, *prompts, *taught),
    )


def of_stage(
    target: str, is_run: bool, stage: str, overrides: Iterable[str], effort: dict[str, int]
) -> Commands:
    """Of a stage of a recipe, or of a run, whose finished stages are used again.

    Args:
        is_run: whether the target is a run directory.
    """
    words = ("--stage", stage, *overrides)
    whole = (f"{target}/resolved.yaml", "--from", target) if is_run else (target,)
    return Commands(
        ("opdctl", "diagnose", target, *words, *effort_words(effort)),
        effort["prompts"],
        ("opdctl", "run", *whole, "--only", stage, *overrides),
        before=f"stages.{stage}.",
    )


def _about(override: str, name: str, domains: list[str]) -> bool:
    """Whether it is about this teacher and its domains, or about neither another's."""
    first, *rest = override.split("=")[0].split(".")
    mine = {"data": domains, "teachers": [name]}
    return first not in mine or not rest or rest[0] in mine[first]


def _plain(value: Any) -> str:
    """A value as an override writes it: itself, or JSON where YAML would read something else."""
    word = isinstance(value, str) and re.fullmatch(r"[\w./@-]+", value)
    return value if word and parse_value(value) == value else json.dumps(value)
