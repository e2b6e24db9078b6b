"""The fingerprint of a stage: a hash of all that can change its result.

It covers the stage's semantic keys, the revisions of its kind and of its members, its data, the
seed, and the fingerprints of its inputs. Source files of opdctl and times are not part of it; the
files of members of one's own are, since nobody else watches over their revisions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from opdctl.config import references
from opdctl.config.registry import member, own_contents
from opdctl.config.schema import flatten, with_role
from opdctl.recipe.recipe import Recipe


def semantic(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Return every key that can change the stage's result, as plain mappings."""
    config = recipe.stages[stage]
    domains = {d: with_role(recipe.data[d], "semantic") for d in recipe.domains(stage)}
    runtime = with_role(recipe.runtime, "semantic")
    if "engines/transformers" not in member("stages", config.kind).uses:  # nothing samples
        runtime = {k: v for k, v in runtime.items() if k not in ("engine", "engine_args")}
    return {
        "stage": with_role(config, "semantic"),
        "data": domains,
        "seed": recipe.seed,
        "runtime": runtime,
    }


def revisions(recipe: Recipe, stage: str) -> dict[str, int]:
    """Return the revision of the stage's kind, of every member it names or always uses.

    Keys are ``family/name``, sorted.
    """
    config = recipe.stages[stage]
    kind = member("stages", config.kind)
    engine = f"engines/{recipe.runtime.engine}"
    names: list[str] = [engine if n == "engines/transformers" else n for n in kind.uses]
    for dotted, text in recipe.references(stage):
        if references.parse(text).form == "server":
            names.append(f"teachers/{'api' if dotted.startswith('sources.') else 'server'}")
    for domain in recipe.domains(stage):
        names.append(f"data/{recipe.data[domain].kind}")
        for family, key in (("environments", "environment"), ("verifiers", "verifier")):
            names += [f"{family}/{name}" for name in getattr(recipe.data[domain], key)]
    names += members_named(config)
    numbers = {name: member(*name.split("/")).revision for name in names}
    return dict(sorted({f"stages/{config.kind}": kind.revision, **numbers}.items()))


def members_named(config: Any) -> Iterator[str]:
    """Yield ``family/name`` of every member that a Config names, at any depth.

    Dictionaries and lists of Configs are searched too. Operational keys are left out, with all
    that stands below them.
    """
    if isinstance(config, dict | list):
        for entry in config.values() if isinstance(config, dict) else config:
            yield from members_named(entry)
    if not dataclasses.is_dataclass(config):
        return
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.metadata.get("role") == "operational":
            continue
        if family := f.metadata.get("family"):
            yield from (f"{family}/{name}" for name in value)
        yield from members_named(value)


def member_record(recipe: Recipe, stage: str) -> dict[str, dict[str, str]]:
    """Return ``members``: the hash of each file of the stage's own members; empty without any."""
    contents = own_contents(revisions(recipe, stage))
    return {"members": contents} if contents else {}


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """Return ``{stage: 16 hex digits}``. A stage that is skipped or reused keeps its own."""
    prints: dict[str, str] = {}
    for stage in recipe.order():
        inputs = {}
        for dotted, text in recipe.references(stage):
            ref = references.parse(text)
            if ref.form == "stage":
                inputs[dotted] = prints[ref.name]
            elif ref.form == "folder":
                inputs[dotted] = (references.origin(ref.name) or {}).get("fingerprint", ref.name)
        name = recipe.stages[stage].seed_group or stage
        content = [semantic(recipe, stage), revisions(recipe, stage), inputs, name]
        own = member_record(recipe, stage)
        content += [own] if own else []  # without any it is what it was before there were any
        text = json.dumps(content)  # in order: that of domains decides the order of rollouts
        prints[stage] = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return prints


def is_stale(record: dict, fingerprint: str) -> bool:
    """Return whether a stage has a record of another fingerprint.

    The stage is made anew then, and nothing of what it made before is used.
    """
    return bool(record) and record.get("fingerprint") != fingerprint


def differences(old: dict, new: dict) -> list[str]:
    """Return ``key: old -> new`` of every leaf that differs."""
    a, b = flatten(old), flatten(new)
    return [
        f"{k}: {a.get(k, '(not set)')!r} -> {b.get(k, '(not set)')!r}"
        for k in sorted(a.keys() | b.keys())
        if a.get(k) != b.get(k)
    ]
