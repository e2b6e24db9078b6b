"""A check of a recipe that responses fit the models that read them, where both sizes are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opdctl.config import references
from opdctl.config.positions import Room, room_of
from opdctl.config.settings import longest_turn
from opdctl.errors import Problem


def room_problems(recipe: Any) -> list[Problem]:
    """Return the stages whose longest prompt and response are longer than a model of theirs reads.

    A prompt counts as one token where no key limits it: each is looked at when the stage starts.
    """
    problems = []
    for stage, config in recipe.stages.items():
        if config.sampling is None:
            continue
        rooms = []
        for key, text in recipe.references(stage):
            if not key.startswith(("data.", "sources.")):
                rooms.append((text, _room(recipe, text, stage)))
        limited = [(name, room) for name, room in rooms if room.longest]
        if not limited:
            continue
        name, room = min(limited, key=lambda pair: pair[1].longest)
        prompt = getattr(config.prompts, "max_tokens", 0) or 1
        most = prompt + longest_turn(config) * _turns(recipe, stage)
        if most > room.longest:
            message, hint = room.complaint(name, most, "a prompt and its response")
            problems.append(Problem(f"stages.{stage}.sampling.max_tokens", message, hint))
    return problems


def _turns(recipe: Any, stage: str) -> int:
    """Return the most turns that a response of a stage has."""
    domains = recipe.domains(stage) if recipe.stages[stage].prompts else {}
    environments = [e for d in domains for e in recipe.data[d].environment.values()]
    return 1 + max([0, *(getattr(e, "turns", 0) for e in environments)])


def _room(recipe: Any, text: str, stage: str) -> Room:
    """Return the room of a referenced model; without a limit where nothing here says it."""
    reference = references.parse(text)
    if reference.form == "policy":
        return _room(recipe, recipe.stages[stage].student, stage)
    if reference.form == "folder":
        place = Path(references.base_of(reference.name) or reference.name)
        try:
            return room_of(json.loads((place / "config.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return Room()  # said of the folder elsewhere, or when it is loaded
    if reference.form == "stage":
        config = recipe.stages[reference.name]
        if config.student:
            return _room(recipe, config.student, reference.name)
        context = config.model.context if config.kind == "pretrain" else 0
        return Room(context, f"stages.{reference.name}.model.context") if context else Room()
    return Room()
