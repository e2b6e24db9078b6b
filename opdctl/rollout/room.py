"""A check before the first step that prompts and what follows them fit a stage's models.

Most prompts are seen to fit by their bytes, of which a token takes one at least, and by what the
template wrote around the first one; the others are rendered. What it cannot know, such as the
replies of an environment, is looked at when a response is sampled and when a sequence goes through
a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from opdctl.config import references
from opdctl.config.positions import Room
from opdctl.config.settings import longest_turn
from opdctl.errors import UsageError
from opdctl.types import Prompt

MARKS = 32  # tokens that a template may write around a turn


def narrowest(ctx, model) -> tuple[str, Room]:
    """Return the name and the room of the model of a stage that reads the shortest sequences.

    Judges and the models that write demonstrations read others; they are not among them.

    Args:
        model: the model that reads the prompts.
    """
    rooms = [(model.name, model.room)]
    for key, reference in ctx.recipe.references(ctx.name):
        form = references.parse(reference).form
        if form in ("stage", "folder", "public") and not key.startswith(("data.", "sources.")):
            rooms.append((reference, ctx.models.room(reference)))
    limited = [(name, room) for name, room in rooms if room.longest]
    return min(limited, key=lambda pair: pair[1].longest, default=(model.name, Room()))


def require_room(ctx, model, domain: str, prompts: Iterable[Prompt]) -> None:
    """Check that sequences of these prompts fit the models of a stage.

    Args:
        model: the model that reads the prompts; it counts their tokens.
        prompts: of one domain.

    Raises:
        UsageError: one may be too long; names the prompt and the model.
        Interrupted: a stop was asked for.
    """
    name, room = narrowest(ctx, model)
    if not room.longest:
        return
    config, environment = ctx.config, ctx.prompts.environment(domain)
    turns = 1 + (environment.turns if environment else 0)
    sampled = longest_turn(config) * turns if config.sampling else 0
    shown = "dataset" in config.sources
    around = None  # tokens of the first prompt: the template's are among them
    for prompt in prompts:
        written = _written(prompt) if shown else ""
        if around is not None and _at_most(prompt, written) + around + sampled <= room.longest:
            continue
        if around is not None:
            ctx.check()
        own = model.prompt_length(prompt)
        around = own if around is None else around
        answer = len(model.encode(written)) if written else 0
        if own + max(sampled, answer) <= room.longest:
            continue
        after = f"a response of {sampled}" if sampled >= answer else f"its answer of {answer}"
        of = f"data.{domain}: the prompt {prompt.text[:60]!r} of {own} tokens with {after}"
        raise UsageError(*room.complaint(name, own + max(sampled, answer), of))


def _written(prompt: Prompt) -> str:
    """Return what a demonstration of a prompt writes; of a conversation its last turn."""
    if prompt.messages and prompt.messages[-1]["role"] == "assistant":
        return str(prompt.messages[-1].get("content") or "")
    return "".join((*prompt.calls, prompt.lead, prompt.answer))


def _at_most(prompt: Prompt, written: str) -> int:
    """Return more tokens than a prompt and its demonstration have, from their bytes.

    What every prompt of the domain has around it is left out.
    """
    said: Any = prompt.messages or prompt.text
    texts = (said if isinstance(said, str) else json.dumps(said, default=str), prompt.system)
    tools = json.dumps(prompt.tools, default=str) if prompt.tools else ""
    size = sum(len(t.encode("utf-8", "replace")) for t in (*texts, tools, written))
    return size + MARKS * (2 + len(prompt.messages))
