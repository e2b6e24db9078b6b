"""Recipe and run directory -> what would run, and why. Pure: it reads records and writes nothing.

A fingerprint hashes what can change a stage's result: its semantic keys, the revisions of its kind
and members, its data, the seed, and its inputs' fingerprints. Never source files of opdctl, never
times; of members of one's own the files too, since nobody else watches over their revisions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from opdctl.config import references
from opdctl.config.registry import member, own_contents
from opdctl.config.schema import flatten, with_role
from opdctl.recipe.recipe import Recipe
from opdctl.run.rundir import RunDir, last_step


@dataclass
class Planned:
    """What happens to one stage.

    Attributes:
        action: run, resume, skip, rerun or blocked.
        reasons: why, in words.
        fingerprint: what its result would be made from.
        run: which run of a set; empty for one alone.
    """

    name: str
    kind: str
    action: str
    reasons: list[str]
    upstream: list[str]
    fingerprint: str = ""
    run: str = ""

    def to_dict(self) -> dict:
        found = dataclasses.asdict(self)
        return found if self.run else {k: v for k, v in found.items() if k != "run"}


def semantic(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Every key that can change the stage's result, as plain mappings."""
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
    """Revision of the stage's kind, of every member it names and of those it always uses."""
    config = recipe.stages[stage]
    kind = member("stages", config.kind)
    found = {f"stages/{config.kind}": kind.revision}
    chosen = {"engines/transformers": f"engines/{recipe.runtime.engine}"}
    used = [chosen.get(name, name) for name in kind.uses]
    found |= {name: member(*name.split("/")).revision for name in used}
    for dotted, text in recipe.references(stage):
        if references.parse(text).form == "server":
            name = f"teachers/{'api' if dotted.startswith('sources.') else 'server'}"
            found[name] = member(*name.split("/")).revision
    for domain in recipe.domains(stage):
        kind = recipe.data[domain].kind
        found[f"data/{kind}"] = member("data", kind).revision
        for family, key in (("environments", "environment"), ("verifiers", "verifier")):
            for name in getattr(recipe.data[domain], key):
                found[f"{family}/{name}"] = member(family, name).revision

    def walk(node: Any) -> None:
        for f in dataclasses.fields(node):
            value = getattr(node, f.name)
            family = f.metadata.get("family")
            if f.metadata.get("role") == "operational":
                continue
            if family:
                for name, entry in value.items():
                    found[f"{family}/{name}"] = member(family, name).revision
                    walk(entry)
            elif dataclasses.is_dataclass(value):
                walk(value)
            elif isinstance(value, dict):
                for entry in filter(dataclasses.is_dataclass, value.values()):
                    walk(entry)

    walk(config)
    return dict(sorted(found.items()))


def member_record(recipe: Recipe, stage: str) -> dict[str, dict[str, str]]:
    """``members``: the hash of each file of the stage's own members; empty without any."""
    contents = own_contents(revisions(recipe, stage))
    return {"members": contents} if contents else {}


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """Stage -> 16 hex digits. Stages that are skipped or reused keep theirs."""
    found: dict[str, str] = {}
    for stage in recipe.order():
        inputs = {}
        for dotted, text in recipe.references(stage):
            ref = references.parse(text)
            if ref.form == "stage":
                inputs[dotted] = found[ref.name]
            elif ref.form == "folder":
                inputs[dotted] = (references.origin(ref.name) or {}).get("fingerprint", ref.name)
        name = getattr(recipe.stages[stage], "seed_group", "") or stage
        content = [semantic(recipe, stage), revisions(recipe, stage), inputs, name]
        own = member_record(recipe, stage)
        content += [own] if own else []  # without any it is what it was before there were any
        text = json.dumps(content)  # in order: that of domains decides the order of rollouts
        found[stage] = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return found


def differences(old: dict, new: dict) -> list[str]:
    """``key: old -> new`` of every leaf that differs."""
    a, b = flatten(old), flatten(new)
    return [
        f"{k}: {a.get(k, '(not set)')!r} -> {b.get(k, '(not set)')!r}"
        for k in sorted(a.keys() | b.keys())
        if a.get(k) != b.get(k)
    ]


def plan(recipe: Recipe, run: RunDir | None = None, only: tuple[str, ...] = ()) -> list[Planned]:
    """One entry per stage, in the order they would run.

    Args:
        run: a run directory to continue or reuse; None plans from nothing.
        only: leave out what these stages do not need.
    """
    prints = fingerprints(recipe)
    wanted = needed(recipe, *only) if only else set(recipe.stages)
    out: list[Planned] = []
    changed: set[str] = set()
    for stage in recipe.order():
        if stage not in wanted:
            continue
        above = recipe.upstream(stage)
        record = run.record(stage) if run else {}
        action, reasons = _action(recipe, stage, prints, record, run, changed & set(above))
        if action in ("run", "rerun", "resume"):
            changed.add(stage)
        kind = recipe.stages[stage].kind
        out.append(Planned(stage, kind, action, reasons, above, prints[stage]))
    return out


def ready(
    recipe: Recipe, run: RunDir | None = None, public: bool = True
) -> tuple[list[str], dict[str, str]]:
    """Stages that can be checked, having teachers or asking servers: those whose models are all
    there, and the others with the reason.

    Args:
        run: a run directory whose finished stages count as there.
        public: whether a public name counts as there; it may have to be fetched.
    """
    now, later = [], {}
    for stage, config in recipe.stages.items():
        teachers = getattr(config, "teachers", {})
        missing = ""
        for text in (config.student, *(t.model for t in teachers.values())) if teachers else ():
            ref = references.parse(text)
            done = run is not None and run.record(ref.name).get("status") == "done"
            if ref.form == "stage" and not done:
                missing = missing or f"stage {ref.name} is not done"
            elif ref.form == "public" and not public:
                missing = missing or f"{ref.name} may have to be fetched"
        if missing:
            later[stage] = missing
        elif teachers or _asks_servers(recipe, stage):
            now.append(stage)
    return now, later


def _asks_servers(recipe: Recipe, stage: str) -> bool:
    """Whether texts of a stage come from a model behind a server, or are judged by one."""
    verifiers = [n for d in recipe.domains(stage) for n in recipe.data[d].verifier]
    return any(member("verifiers", name).asks_server for name in verifiers) or any(
        references.parse(text).form == "server" for _, text in recipe.references(stage)
    )


def _action(recipe, stage, prints, record, run, changed) -> tuple[str, list[str]]:
    folders = [references.parse(text) for _, text in recipe.references(stage)]
    missing = [r.name for r in folders if r.form == "folder" and not references.is_there(r.name)]
    if missing and record.get("status") == "done":
        return "skip", [f"done; the model in {missing[0]} is gone since"]
    if missing:
        return "blocked", [f"no model in {missing[0]}"]
    if not record:
        return "run", ["not started"]
    if record.get("fingerprint") != prints[stage]:
        reasons = differences(record.get("semantic", {}), semantic(recipe, stage))
        reasons += [
            f"revision of {line}"
            for line in differences(record.get("revisions", {}), revisions(recipe, stage))
        ]
        reasons += _changed_files(record, member_record(recipe, stage))
        return "rerun", reasons or [f"its input {name} changed" for name in sorted(changed)] or [
            "an input changed"
        ]
    if record.get("status") == "done":
        return "skip", ["done"]
    steps = [int(p.name[5:]) for p in (run.stage(stage) / "checkpoints").glob("step-*")]
    taken = last_step(run.stage(stage) / "metrics.jsonl")
    if steps:
        logged = ", and from the log of the steps since" if taken > max(steps) else ""
        reason = f"{record['status']} after step {max(taken, *steps)}"
        return "resume", [f"{reason}; goes on from its checkpoint of step {max(steps)}{logged}"]
    after = f" after step {taken}," if taken else ""
    return "run", [f"{record['status']}{after} before its first checkpoint"]


def _changed_files(record: dict, now: dict) -> list[str]:
    """``members/signals/mine.py changed``, of each file that has other contents than before."""
    old, new = record.get("members", {}), now.get("members", {})
    both = sorted(old.keys() & new.keys())
    return [f"members/{path} changed" for path in both if old[path] != new[path]]


def needed(recipe: Recipe, *stages: str) -> set[str]:
    """Stages and everything they read, directly or not."""
    found: set[str] = set()
    waiting = list(stages)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += recipe.upstream(name)
    return found
