"""Dataclass -> checked configuration: unknown keys, wrong types, all collected.

A key is a dataclass field made by ``key(default, doc)``. What a key may change decides its role:

    semantic      it changes results; part of the fingerprint (the default)
    numeric       results stay equal up to rounding (threads, micro-batch)
    operational   results do not change at all (logging, checkpoint cadence)

Nothing here knows a recipe; ``recipe.py`` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Literal

from opdctl.errors import Note, Problem, UsageError

REQUIRED = dataclasses.MISSING
Lookup = Callable[[str, str], type]  # (family, member name) -> its Config


def key(
    default: Any,
    doc: str,
    *,
    role: str = "semantic",
    family: str = "",
    ref: bool = False,
    domains: bool = False,
    neutral: bool = False,
    keep: bool = False,
    least: float | None = None,
    most: float | None = None,
    was: str = "",
):
    """A field of a Config.

    Args:
        default: the vetted setting, or REQUIRED. A mutable one is copied.
        doc: one line, with unit and range where they are not obvious.
        role: semantic, numeric or operational.
        family: the value is a mapping ``member name -> that member's Config``; so is the default.
        ref: the value names a model: an edge of the stage graph.
        domains: the value names a domain, or its keys do.
        neutral: the key came later and its default changes nothing: at its default it is left out
            of fingerprints, so that finished runs stay as they are.
        keep: members of the default stay where others are given; with ``family``.
        least, most: bounds of a number, inclusive.
        was: the key's name before it was renamed: still read, and the name that fingerprints hash,
            so that finished runs stay finished. Of both names in one mapping the later one counts.
    """
    metadata = {
        "doc": doc,
        "role": role,
        "family": family,
        "ref": ref,
        "domains": domains,
        "neutral": neutral,
        "keep": keep,
        "least": least,
        "most": most,
        "was": was,
    }
    if isinstance(default, dict | list) or (
        dataclasses.is_dataclass(default) and not isinstance(default, type)
    ):
        return dataclasses.field(default_factory=lambda: _copy(default), metadata=metadata)
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _copy(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value)
    container: Any = type(value)
    return container(value)


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "known:") -> str:
    """Return ``did you mean 'x'?``, or the list of all that is known."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"{otherwise} {', '.join(known)}" if known else ""


@lru_cache
def hints_of(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def build(
    cls: type, raw: Any, path: str, problems: list[Problem], lookup: Lookup, base: Any = None
) -> Any:
    """An instance of ``cls`` from a plain mapping; None where that is not possible.

    Keys not given keep the value they have in ``base``, or else their default. A Config may say
    why it lacks a key that others have: ``absent``, key -> reason.

    Every problem is appended with its full dotted path; the caller raises.
    """
    if not isinstance(raw, dict):
        problems.append(Problem(path, f"expected a mapping, got {_shown(raw)}"))
        return None
    hints = hints_of(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for name, where, value in _renamed(raw, fields, path, problems):
        if name not in fields:
            hint = getattr(cls, "absent", {}).get(name) or did_you_mean(str(name), fields)
            problems.append(Problem(where, "unknown key", hint))
            continue
        f = fields[name]
        below = getattr(base, name, None)
        if below is None and f.default_factory is not REQUIRED:
            below = f.default_factory()
        if f.metadata.get("family") and isinstance(value, str):
            value = {value: {}}  # a member's name alone
        if f.metadata.get("family") and isinstance(below, dict) and isinstance(value, dict):
            value = {  # a member the default names too keeps the default's keys
                k: {**(below.get(k) or {}), **v} if isinstance(v, dict) else v
                for k, v in value.items()
            }
            if f.metadata.get("keep"):
                value = {**below, **value}
        if dataclasses.is_dataclass(below) and isinstance(value, dict):
            values[name] = build(type(below), value, where, problems, lookup, below)
        else:
            values[name] = _value(hints[name], value, where, problems, lookup, f.metadata)
    read = {f.name for f in fields.values() if f.name in raw or f.metadata.get("was") in raw}
    for name, f in fields.items():
        if name not in read and base is not None:
            values[name] = getattr(base, name)
        if name in read or name in values:
            continue
        if f.metadata.get("family") and f.default_factory is not REQUIRED:
            where = f"{path}.{name}" if path else name
            family = f.metadata["family"]
            values[name] = _members(f.default_factory(), where, problems, lookup, family)
            continue
        if f.default is not REQUIRED or f.default_factory is not REQUIRED:
            continue
        problems.append(
            Problem(path, f"missing key {name!r}", f"{name}: {f.metadata.get('doc', '')}")
        )
        values[name] = None
    return cls(**values)


def _renamed(
    raw: dict, fields: dict[str, dataclasses.Field], path: str, problems: list[Problem]
) -> list[tuple[str, str, Any]]:
    """Return name, dotted key as written, and value of each key, old names replaced by new ones;
    a note is left among the problems. What stands later is laid over what stands before."""
    new_names = {f.metadata["was"]: f.name for f in fields.values() if f.metadata.get("was")}
    entries: dict[Any, tuple[str, Any]] = {}
    for written, value in raw.items():
        where = f"{path}.{written}" if path else str(written)
        name = new_names.get(written, written)
        if name != written:
            problems.append(Note(where, f"is called {name} now"))
        if name in entries:
            value = _laid_over(entries[name][1], value)
        entries[name] = (where, value)
    return [(name, where, value) for name, (where, value) in entries.items()]


def _laid_over(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {k: _laid_over(below.get(k), v) for k, v in above.items()}


def _value(hint, value, path, problems, lookup, meta):
    origin = typing.get_origin(hint)
    if meta.get("family"):
        return _members(value, path, problems, lookup, meta["family"])
    if origin in (typing.Union, types.UnionType):
        options = [h for h in typing.get_args(hint) if h is not type(None)]
        if value is None and len(options) < len(typing.get_args(hint)):
            return None
        simple = [h for h in options if not dataclasses.is_dataclass(h)]
        simple.sort(key=lambda h: (typing.get_origin(h) is list) != isinstance(value, list))
        records = [h for h in options if isinstance(h, type) and dataclasses.is_dataclass(h)]
        if records and isinstance(value, dict):
            return build(records[0], value, path, problems, lookup)
        return _value(simple[0] if simple else options[0], value, path, problems, lookup, meta)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        short = getattr(hint, "short", None)
        if isinstance(value, str) and short is not None:
            value = {short: value}
        return build(hint, value, path, problems, lookup)
    if origin is dict:
        if not isinstance(value, dict):
            problems.append(Problem(path, f"expected a mapping, got {_shown(value)}"))
            return {}
        inner = typing.get_args(hint)[1]
        for name in value:
            if "." in str(name):  # a dotted key would lead elsewhere
                problems.append(Problem(path, f"{name!r:.80}: a name has no dot"))
        return {
            str(k): _value(inner, v, f"{path}.{k}", problems, lookup, {}) for k, v in value.items()
        }
    if origin is list:
        if not isinstance(value, list):
            problems.append(Problem(path, f"expected a list, got {_shown(value)}"))
            return []
        inner = typing.get_args(hint)[0]
        return [_value(inner, v, f"{path}.{i}", problems, lookup, {}) for i, v in enumerate(value)]
    return _scalar(hint, value, path, problems, meta)


def _members(value, path, problems, lookup, family):
    if not isinstance(value, dict):
        problems.append(Problem(path, f"expected a mapping of {family}, got {_shown(value)}"))
        return {}
    built = {}
    for name, entry in value.items():
        where = f"{path}.{name}"
        try:
            cls = lookup(family, str(name))
        except UsageError as error:
            problems.append(Problem(where, error.message, error.hint))
            continue
        built[name] = build(cls, {} if entry is None else entry, where, problems, lookup)
    return built


def _scalar(hint, value, path, problems, meta):
    if hint is Any:
        return value
    if typing.get_origin(hint) is Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            problems.append(
                Problem(path, f"{value!r:.80} is not allowed", did_you_mean(str(value), allowed))
            )
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is float and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML 1.1 reads 1e-3 as text
    right = isinstance(value, hint) and not (hint is not bool and isinstance(value, bool))
    if not right:
        empty = "'\"\"' is an empty text" if hint is str and value is None else ""
        problems.append(Problem(path, f"expected {_name(hint)}, got {_shown(value)}", empty))
        return value
    least, most = meta.get("least"), meta.get("most")
    if hint in (int, float):
        if value != value or value in (float("inf"), float("-inf")):
            problems.append(Problem(path, f"{value} is not a finite number"))
        elif least is not None and value < least:
            problems.append(Problem(path, f"{value} is below {least}"))
        elif most is not None and value > most:
            problems.append(Problem(path, f"{value} is above {most}"))
    return value


def _name(hint) -> str:
    return {int: "an integer", float: "a number", str: "text", bool: "true or false"}.get(
        hint, str(hint)
    )


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r:.80}"


def to_dict(config: Any) -> Any:
    """Return a Config as plain mappings and scalars, defaults included."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {k: to_dict(v) for k, v in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(v) for v in config]
    return config


def has_key(config: Any, name: str) -> bool:
    """Return True where a Config has a key of that name."""
    return any(f.name == name for f in dataclasses.fields(config))


def with_role(config: Any, role: str) -> Any:
    """The keys of one role, as plain mappings; nested Configs are searched whatever theirs."""
    if isinstance(config, dict):
        return {k: with_role(v, role) for k, v in config.items()}
    if not dataclasses.is_dataclass(config):
        return to_dict(config)
    kept = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.metadata.get("neutral") and value == _default(f):
            continue
        if f.metadata.get("role", "semantic") == role or dataclasses.is_dataclass(value):
            kept[f.metadata.get("was") or f.name] = with_role(value, role)
    return kept


def role_of(config: Any, dotted: str) -> str:
    """The role of a dotted key: the first on the way to it that is not semantic decides."""
    for part in dotted.split("."):
        if isinstance(config, dict):
            config = config.get(part)
            continue
        if not dataclasses.is_dataclass(config) or not has_key(config, part):
            break
        role = type(config).__dataclass_fields__[part].metadata.get("role", "semantic")
        if role != "semantic":
            return role
        config = getattr(config, part)
    return "semantic"


def _default(f: dataclasses.Field) -> Any:
    factory: Any = f.default_factory  # a key has a default, a factory or is required
    return f.default if f.default is not REQUIRED else factory()


def references(config: Any, path: str = "") -> list[tuple[str, str]]:
    """Yield ``(dotted key, model reference)`` of every key marked ``ref``, as declared."""
    pairs = []
    if isinstance(config, dict):
        for k, v in config.items():
            pairs += references(v, f"{path}.{k}" if path else str(k))
    elif dataclasses.is_dataclass(config):
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        if values.get("coef", 1.0) == 0:
            return []  # turned off: it reads nothing
        for f in dataclasses.fields(config):
            value = values[f.name]
            where = f"{path}.{f.name}" if path else f.name
            if f.metadata.get("ref") and isinstance(value, str):
                pairs.append((where, value))
            elif f.metadata.get("ref") and isinstance(value, dict):
                pairs += [(f"{where}.{k}", v) for k, v in value.items() if isinstance(v, str)]
            else:
                pairs += references(value, where)
    return pairs


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as ``{dotted key: scalar or list}``."""
    if not isinstance(tree, dict) or (not tree and prefix):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for k, v in tree.items():
        flat.update(flatten(v, f"{prefix}.{k}" if prefix else str(k)))
    return flat
