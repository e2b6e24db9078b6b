"""Family and file name -> class. The file name is the registration.

``loss/signals/reverse_kl.py`` is the member ``reverse_kl`` of the family ``signals``; it defines
one class named after the file (``ReverseKl``) with a nested ``Config``. A member is imported when
asked for, and declares its Config without importing torch.
"""

from __future__ import annotations

import importlib
import inspect
from functools import lru_cache
from importlib import resources

from opdctl.config.schema import did_you_mean
from opdctl.errors import UsageError

FOLDERS = {  # where a family stands in the package; a user speaks of the family alone
    "stages": "stages",
    "data": "rollout/data",
    "verifiers": "rollout/verifiers",
    "sources": "rollout/sources",
    "environments": "rollout/environments",
    "engines": "rollout/engines",
    "rewards": "rollout/rewards",
    "teachers": "scoring/teachers",
    "signals": "loss/signals",
    "objectives": "loss/objectives",
    "weights": "loss/weights",
    "controllers": "train/controllers",
    "preflight": "checks/preflight",
    "watchdogs": "train/watchdogs",
    "claims": "evidence/claims",
}

FAMILIES = {
    "stages": "what a recipe is made of",
    "data": "where prompts, answers and what verifies them come from",
    "verifiers": "whether an answer is right",
    "sources": "where a trajectory comes from",
    "environments": "answers to what a response asks, between its turns",
    "engines": "response ids with the sampler's own log-probs",
    "rewards": "one number per rollout",
    "teachers": "scores for a request",
    "signals": "per-token credit, no gradient, larger is better",
    "objectives": "per-token loss with a gradient",
    "weights": "per-token factor, no gradient",
    "controllers": "hooks on a step: they read it, or act on the weights after it",
    "preflight": "is this student, with these teachers, fit to start",
    "watchdogs": "eyes on what a training step logs; they warn, or stop the stage",
    "claims": "statements of the reports, judged on what a run measured",
}


@lru_cache
def members(family: str) -> tuple[str, ...]:
    """Names of the members of a family, sorted."""
    folder = resources.files("opdctl") / FOLDERS[family]
    names = (entry.name for entry in folder.iterdir())
    return tuple(sorted(n[:-3] for n in names if n.endswith(".py") and not n.startswith("_")))


@lru_cache
def member(family: str, name: str) -> type:
    """The class of a member.

    Raises:
        UsageError: no such member; names the nearest.
    """
    if name not in members(family):
        raise UsageError(
            f"no member {name!r} in {family}/", did_you_mean(name, members(family), "one of")
        )
    module = importlib.import_module(f"opdctl.{FOLDERS[family].replace('/', '.')}.{name}")
    return getattr(module, class_name(name))


def needs_of(cls: type, config: object) -> tuple[str, ...]:
    """What a member needs with these keys: its ``needs``, and what ``also(config)`` adds."""
    return (*cls.needs, *cls.needs_for(config))


def parse_need(need: str) -> tuple[str, str]:
    """``teacher.hidden{all}`` -> the need and what it is about; ``""`` where it says nothing."""
    name, _, about = need.partition("{")
    return name, about.removesuffix("}")


def config_of(family: str, name: str, **keys: object) -> object:
    """A member's Config with some keys set, for a stage that always uses it."""
    return member(family, name).Config(**keys)


def class_name(name: str) -> str:
    """``reverse_kl`` -> ``ReverseKl``."""
    return "".join(part.capitalize() for part in name.split("_"))


def first_line(cls: type) -> str:
    """The first line of a member's docstring: what ``opdctl ls`` prints."""
    return (inspect.getdoc(cls) or "").split("\n", 1)[0]
