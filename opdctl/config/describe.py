"""The keys of a Config as rows of text, for ``opdctl show``."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

from opdctl.config.schema import REQUIRED, Lookup, hints_of, to_dict


def describe(cls: type, lookup: Lookup, prefix: str = "") -> list[dict[str, str]]:
    """Return one row per key: name, type, default, role, doc."""
    rows = []
    hints = hints_of(cls)
    for f in dataclasses.fields(cls):
        name = f"{prefix}{f.name}"
        hint = hints[f.name]
        if f.metadata.get("family"):
            shown = f"{f.metadata['family']}/"
        else:
            shown = _type_name(hint)
        default = f.default
        if default is REQUIRED and f.default_factory is not REQUIRED:
            default = f.default_factory()
        nested = dataclasses.is_dataclass(default) and not isinstance(default, type)
        rows.append(
            {
                "key": name,
                "type": shown,
                "default": "" if nested else "required" if default is REQUIRED else _plain(default),
                "role": f.metadata.get("role", "semantic"),
                "doc": f.metadata.get("doc", ""),
            }
        )
        if nested:
            rows += describe(type(default), lookup, f"{name}.")
        values = typing.get_args(hint)[1:] if typing.get_origin(hint) is dict else ()
        record = values[0] if values else None
        if isinstance(record, type) and dataclasses.is_dataclass(record):
            rows += describe(record, lookup, f"{name}.NAME.")
    return rows


def _plain(default: Any) -> str:
    return str(to_dict(default)) if not isinstance(default, str) else default


def _type_name(hint) -> str:
    if typing.get_origin(hint) is Literal:
        return " | ".join(str(a) for a in typing.get_args(hint))
    if typing.get_origin(hint) is types.UnionType or typing.get_origin(hint) is typing.Union:
        each = ("None" if h is type(None) else _type_name(h) for h in typing.get_args(hint))
        return " | ".join(each)
    if isinstance(hint, type) and typing.get_origin(hint) is None:
        return hint.__name__
    if typing.get_origin(hint) is dict and dataclasses.is_dataclass(typing.get_args(hint)[1]):
        return f"NAME: {typing.get_args(hint)[1].__name__.lower()}"
    return str(hint).replace("opdctl.config.settings.", "").replace("typing.", "")
