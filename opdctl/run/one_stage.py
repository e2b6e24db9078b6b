"""The recipe of ``opdctl stage``: one stage, from what stands on the command line.

Where a key is left out and only one value fits, it is filled in and said: the kind of a data entry
by its path, the policy whose rollouts an outcome model judges, the share held out of a file that is
evaluated on: all of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from opdctl.config import references
from opdctl.config.describe import describe
from opdctl.config.registry import member
from opdctl.config.schema import did_you_mean
from opdctl.config.shards import shards
from opdctl.errors import OpdctlError, UsageError
from opdctl.recipe import methods
from opdctl.recipe.recipe import lookup
from opdctl.recipe.resolution import TOP
from opdctl.run.launch import read_recipe
from opdctl.run.rundir import RunDir


def one_stage(
    kind: str,
    overrides: tuple[str, ...],
    student: str,
    teachers: tuple[str, ...],
    method: str,
) -> tuple[dict, tuple[str, ...], list[str], list[str]]:
    """Return ``(tree, overrides in full, names of the teachers, lines on what was filled in)``.

    Raises:
        UsageError: no such method, or of another kind; a key of no stage; two teachers of a name;
            a student or a teacher where the kind has none, or no student.
    """
    config = member("stages", kind).Config
    keys = config.__dataclass_fields__
    entry: dict[str, Any] = {"kind": kind}
    if method:
        chosen = methods.method(method)
        if chosen.get("kind", kind) != kind:
            raise UsageError(
                f"method {method} is for stage {chosen['kind']}",
                f"opdctl stage {chosen['kind']} --method {method}",
            )
        entry |= {k: v for k, v in chosen.items() if k not in ("about", "kind")}
    said = []
    if student and "student" not in keys:
        raise UsageError(f"{kind} starts from no model: it takes no --student", "leave it out")
    if student:
        entry["student"] = student
    overridden = {o.split("=")[0].split(".")[0] for o in overrides}
    if "student" in keys and not {"student"} & (entry.keys() | overridden):
        doc = keys["student"].metadata.get("doc", "")
        raise UsageError(f"{kind} needs a student: {doc}", "--student FOLDER, or org/name")
    if student and "policy" in keys and "policy" not in overridden:
        entry["policy"] = student
        said.append("policy: the student, as no other is given")
    named = [t.split("=", 1) if "=" in t else ["teacher", t] for t in teachers]
    if len({n for n, _ in named}) < len(named):
        raise UsageError("two teachers with one name", "--teacher math=REF --teacher sort=REF")
    if named and "teachers" in keys:
        entry["teachers"] = dict(named)
    elif named and kind == "sft":
        entry["sources"] = {"teacher": _sampler(teachers, named)}
        said.append("sources: the answers that the teacher samples and the verifier passes")
    elif named:
        raise UsageError(f"{kind} has no teachers: it takes no --teacher", "opdctl stage opd")
    full = tuple(_full(kind, config, o) for o in overrides)
    tree: dict[str, Any] = {"name": kind, "stages": {kind: entry}}
    data = _kinds(kind, full, said)
    if data:
        tree["data"] = data
    return tree, full, [n for n, _ in named], said


def _sampler(teachers: tuple[str, ...], named: list[list[str]]) -> dict[str, Any]:
    """Return the teacher source of an sft stage: one model, or one for each domain."""
    experts = {n: r for text, (n, r) in zip(teachers, named, strict=True) if "=" in text}
    source: dict[str, Any] = {"model": named[0][1]}
    return source | {"experts": experts} if experts else source


def _full(kind: str, config: type, override: str) -> str:
    """Return an override with ``stages.KIND.`` in front of a key of the stage.

    Raises:
        UsageError: nothing has this key; says which may be meant.
    """
    first = override.split("=")[0].split(".")[0].strip()
    if first in config.__dataclass_fields__:
        return f"stages.{kind}.{override}"
    if first in TOP or "=" not in override:
        return override  # without = it is refused, in words, where overrides are read
    known = [row["key"] for row in describe(config, lookup)]
    below = [k for k in known if k.rsplit(".", 1)[-1] == first]
    near = f"did you mean {below[0]}?" if below else did_you_mean(first, [*known, *TOP], "keys:")
    raise UsageError(f"{override}: {kind} has no key {first!r}", near)


def _kinds(kind: str, overrides: Iterable[str], said: list[str]) -> dict[str, dict]:
    """Return ``{domain: {"kind": ...}}`` of the data entries that name no kind."""
    keys_of: dict[str, dict[str, str]] = {}
    for override in overrides:
        path, _, value = override.partition("=")
        parts = path.split(".")
        if parts[0] == "data" and len(parts) > 2:
            keys_of.setdefault(parts[1], {})[".".join(parts[2:])] = value
    entries: dict[str, dict] = {}
    for domain, keys in keys_of.items():
        if "kind" in keys or not ("path" in keys or "task" in keys):
            continue
        path = keys.get("path", "")
        file = Path(path).suffix in (".jsonl", ".json", ".parquet") or bool(shards(path))
        chosen = "reasoning_gym" if not path else "jsonl" if file else "hf"
        entries[domain] = {"kind": chosen}
        said.append(f"data.{domain}.kind: {chosen}")
        if kind == "evaluate" and chosen != "reasoning_gym" and "eval_share" not in keys:
            entries[domain]["eval_share"] = 1.0
            said.append(f"data.{domain}.eval_share: 1, all of {path} is evaluated on")
    return entries


def run_data(models: list[str]) -> dict[str, dict]:
    """Return the data entries of the run that wrote one of these models; empty if none did."""
    for text in models:
        ref = references.parse(text)
        folder = Path(ref.name)
        if ref.form == "folder" and len(folder.parents) > 2:
            with contextlib.suppress(OpdctlError):
                return read_recipe(RunDir(folder.parents[2])).to_dict()["data"]
    return {}
