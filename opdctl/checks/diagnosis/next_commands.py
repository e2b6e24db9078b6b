"""Build the commands to type after a diagnosis, complete with its data and overrides.

For models named on the command line they are stages of their own, ``opdctl stage``; for a stage of
a recipe or a run they are ``opdctl run`` of that stage with other keys. Pure; no torch.
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
class NextCommands:
    """The commands for one teacher, as words of a command line.

    Attributes:
        diagnose: the words that repeat the diagnosis, without ``--prompts``.
        prompts: the prompts of each domain that the diagnosis used.
        opd_stage: the words that run the opd stage; its keys are appended.
        key_prefix: the prefix of these keys.
        sft_stage: the words that run an sft stage of the student on the teacher's samples; empty
            where there is no such command.
    """

    diagnose: tuple[str, ...]
    prompts: int
    opd_stage: tuple[str, ...]
    key_prefix: str = ""
    sft_stage: tuple[str, ...] = ()

    def with_more_prompts(self) -> str:
        """Return the diagnosis with four times the prompts."""
        return shlex.join([*self.diagnose, "--prompts", str(4 * self.prompts)])

    def opd(self, signals: str, objectives: str) -> str:
        """Return the opd stage with these signals and objectives, both as written in a recipe."""
        keys = {"signals": signals, "objectives": objectives}
        words = [f"{self.key_prefix}{k}={v}" for k, v in keys.items()]
        return shlex.join([*self.opd_stage, *words])

    def opd_as_it_is(self) -> str:
        """Return the opd stage with the signals that it has."""
        return shlex.join(self.opd_stage)

    def sft(self) -> list[str]:
        """Return the sft stage: one line, or none."""
        return [shlex.join(self.sft_stage)] if self.sft_stage else []


def effort_options(effort: dict[str, int]) -> list[str]:
    """Return the options that limit a diagnosis, without ``--prompts``."""
    return [word for k, v in effort.items() if k != "prompts" for word in (f"--{k}", str(v))]


def for_models(
    entry: dict[str, Any],
    name: str,
    student: str,
    teachers: Iterable[str],
    data: dict[str, dict[str, dict]],
    overrides: Iterable[str],
    effort: dict[str, int],
) -> NextCommands:
    """Return the commands for a teacher named with ``--teacher``, on its domains only.

    Args:
        entry: the measurements of the teacher.
        data: the data entries of each ``--data``.
    """
    overrides = tuple(overrides)
    words = [word for t in teachers for word in ("--teacher", t)]
    words = ["--student", student, *words, *(word for d in data for word in ("--data", d))]
    again = ("opdctl", "diagnose", *words, *overrides, *effort_options(effort))
    model = entry["model"]
    pair = ("--student", student, "--teacher", model if name == "teacher" else f"{name}={model}")
    entries = {domain: keys for named in data.values() for domain, keys in named.items()}
    prompts = [
        f"data.{domain}.{key}={_override_value(value)}"
        for domain in entry["domains"]
        for key, value in entries.get(domain, {}).items()
        if value is not None
    ]
    short = [o.removeprefix("stages.opd.") for o in overrides]
    mine = [o for o in short if _concerns(o, name, entry["domains"])]
    roots = [(o.split("=")[0].split(".")[0], o) for o in mine]
    sft_keys = [f"sources.teacher.{o}" for first, o in roots if first == "sampling"]
    sft_keys += [o for first, o in roots if first in TOP]
    return NextCommands(
        again,
        effort["prompts"],
        ("opdctl", "stage", "opd", *pair, *prompts, *mine),
        sft_stage=("opdctl", "stage", "sft", *pair, *prompts, *sft_keys),
    )


def for_stage(
    target: str, is_run: bool, stage: str, overrides: Iterable[str], effort: dict[str, int]
) -> NextCommands:
    """Return the commands for a stage of a recipe, or of a run, whose finished stages are reused.

    Args:
        is_run: True where the target is a run directory.
    """
    words = ("--stage", stage, *overrides)
    whole = (f"{target}/resolved.yaml", "--from", target) if is_run else (target,)
    return NextCommands(
        ("opdctl", "diagnose", target, *words, *effort_options(effort)),
        effort["prompts"],
        ("opdctl", "run", *whole, "--only", stage, *overrides),
        key_prefix=f"stages.{stage}.",
    )


def _concerns(override: str, name: str, domains: list[str]) -> bool:
    """Return False for an override of another teacher or of a domain that is not this one's."""
    first, *rest = override.split("=")[0].split(".")
    mine = {"data": domains, "teachers": [name]}
    return first not in mine or not rest or rest[0] in mine[first]


def _override_value(value: Any) -> str:
    """Return a value as an override writes it, in JSON where YAML would read something else."""
    word = isinstance(value, str) and re.fullmatch(r"[\w./@-]+", value)
    return value if word and parse_value(value) == value else json.dumps(value)
