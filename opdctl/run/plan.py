"""The plan of a recipe: what happens to each stage, and why. It is decided here alone.

``plan`` and ``--dry-run`` show it; ``run``, ``resume`` and ``run --from`` carry it out. Records are
read, and files are hashed where their contents decide. Nothing is written.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal

from opdctl.config import references
from opdctl.config.registry import member
from opdctl.recipe.recipe import Recipe
from opdctl.run import provenance
from opdctl.run.fingerprint import (
    differences,
    fingerprints,
    is_stale,
    member_record,
    revisions,
    semantic,
)
from opdctl.run.rundir import RunDir, last_step

Files = Literal["none", "needed", "all"]


@dataclass
class Planned:
    """A stage and its action.

    Attributes:
        action: run, resume, skip, rerun or blocked.
        reasons: why, in words.
        fingerprint: a hash of what its result would be made from.
        run: the run's name in a set of them; empty for one alone.
    """

    name: str
    kind: str
    action: str
    reasons: list[str]
    upstream: list[str]
    fingerprint: str = ""
    run: str = ""

    def to_dict(self) -> dict:
        """Return it for JSON; ``run`` is left out where it is empty."""
        content = dataclasses.asdict(self)
        return content if self.run else {k: v for k, v in content.items() if k != "run"}


def plan(
    recipe: Recipe,
    run: RunDir | None = None,
    only: tuple[str, ...] = (),
    *,
    reuse: bool = False,
    files: Files = "needed",
) -> list[Planned]:
    """Return one entry per stage, in the order they would run.

    Args:
        run: a run directory to continue; None plans from nothing.
        only: leave out the stages that these do not need.
        reuse: ``run`` is not continued: a new run copies its finished stages.
        files: the files to hash while a run is continued. ``needed``: those that stages still to
            run read. ``all``: also those that finished stages read and wrote, which change a
            reason and no action. ``none``: records alone. With ``reuse`` it is always ``all``.

    Raises:
        UsageError: ``run`` is not a run directory, or a file in question cannot be read.
    """
    if run:
        run.manifest()
    decisions = _Decisions(recipe, run, reuse, "all" if reuse else files)
    wanted = needed(recipe, *only) if only else set(recipe.stages)
    for stage in recipe.order():
        if stage in wanted:
            decisions.add(stage)
    return list(decisions.planned.values())


class _Decisions:
    """The stages decided on so far; each is decided after all that it reads."""

    def __init__(self, recipe: Recipe, run: RunDir | None, reuse: bool, files: Files) -> None:
        self.recipe, self.run, self.reuse, self.files = recipe, run, reuse, files
        self.prints = fingerprints(recipe)
        self.planned: dict[str, Planned] = {}
        self.records = provenance.current_records(run, recipe) if run else {}
        self.hashes = functools.cache(provenance.model)  # many stages read one folder

    @property
    def made(self) -> RunDir:
        """The run directory, of a stage that has a record in it."""
        assert self.run is not None, "without a run directory there is no record"
        return self.run

    def add(self, stage: str) -> None:
        """Decide on a stage."""
        action, reasons = self._decide(stage, self.run.record(stage) if self.run else {})
        upstream, kind = self.recipe.upstream(stage), self.recipe.stages[stage].kind
        entry = Planned(stage, kind, action, reasons, upstream, self.prints[stage])
        self.planned[stage] = entry

    def _decide(self, stage: str, record: dict) -> tuple[str, list[str]]:
        folders = [references.parse(text) for _, text in self.recipe.references(stage)]
        gone = [r.name for r in folders if r.form == "folder" and not references.is_there(r.name)]
        done = record.get("status") == "done"
        if gone and done:
            return "skip", [f"done; the model in {gone[0]} is gone since"]
        if gone:
            return "blocked", [f"no model in {gone[0]}"]
        if done and not is_stale(record, self.prints[stage]):
            return self._finished(stage, record)
        blocked = self._blocked(stage)
        if blocked:
            return "blocked", [blocked]
        if not record:
            return "run", ["not started"]
        if is_stale(record, self.prints[stage]):
            cleared = [] if self.reuse else ["all that it made is removed first"]
            return "rerun", [*self._differences(stage, record), *cleared]
        return self._unfinished(stage, record)

    def _finished(self, stage: str, record: dict) -> tuple[str, list[str]]:
        """Decide on a stage that is done, by what its files hold now."""
        changes = self._changes(stage, record) if self.files == "all" else []
        if not self.reuse:
            way = [f"`opdctl run RECIPE --from {self.made.path}` makes it again"] if changes else []
            return "skip", ["done", *changes, *way]
        again = self._planned("rerun", self.recipe.upstream(stage))
        changes += [f"its input {name} is made again" for name in again]
        return ("rerun", changes) if changes else ("skip", ["done"])

    def _changes(self, stage: str, record: dict) -> list[str]:
        """Return a line for each thing that a finished stage read or wrote and that is another now.

        The output of another stage is that stage's to compare. A file that is gone is no change.
        """
        lines, seen = [], record.get("inputs", {})
        files = provenance.local_inputs(self.made, self.recipe, stage, self.hashes, ("folder",))
        for dotted, now in files.items():
            before = seen.get(dotted, now)
            changed = [part for part in now if part != "path" and before.get(part) != now[part]]
            lines += [f"{dotted}: {now['path']} has other {part} since" for part in changed]
        now = self.hashes(self.made.output(stage))
        before = record.get("output", now)
        changed = [part for part in {**before, **now} if before.get(part) != now.get(part)]
        return lines + [f"its own output has other {part} since" for part in changed]

    def _blocked(self, stage: str) -> str:
        """Return why a stage that is not done cannot start, as its worker would say it."""
        upstream = self.recipe.upstream(stage)
        if blocked := self._planned("blocked", upstream):
            return f"its input {blocked[0]} is blocked"
        if self.reuse or self.files == "none" or not self.records:
            return ""
        standing = self._planned("skip", upstream)
        later = {str(self.made.output(name)) for name in upstream if name not in standing}
        now = provenance.local_inputs(self.made, self.recipe, stage, self.hashes)
        now = {dotted: entry for dotted, entry in now.items() if entry["path"] not in later}
        return provenance.first_change(self.made, stage, now, self.records)

    def _planned(self, action: str, stages: list[str]) -> list[str]:
        return [name for name in stages if self.planned[name].action == action]

    def _differences(self, stage: str, record: dict) -> list[str]:
        """Return what differs between a record and the recipe, one line each; at least one."""
        now = revisions(self.recipe, stage)
        lines = differences(record.get("semantic", {}), semantic(self.recipe, stage))
        lines += [f"revision of {line}" for line in differences(record.get("revisions", {}), now)]
        lines += _changed_files(record, member_record(self.recipe, stage))
        changed = self._planned("rerun", self.recipe.upstream(stage))
        lines = lines or [f"its input {name} changed" for name in sorted(changed)]
        return lines or ["an input changed"]

    def _unfinished(self, stage: str, record: dict) -> tuple[str, list[str]]:
        """Decide on a stage that was begun and is not done, by its checkpoints."""
        folder, status = self.made.stage(stage), record["status"]
        if self.reuse:
            return "run", [f"{status} in {self.made.path}: only finished stages are reused"]
        steps = [int(p.name[5:]) for p in (folder / "checkpoints").glob("step-*")]
        taken = last_step(folder / "metrics.jsonl")
        if steps:
            logged = ", and from the log of the steps since" if taken > max(steps) else ""
            reason = f"{status} after step {max(taken, *steps)}"
            return "resume", [f"{reason}; goes on from its checkpoint of step {max(steps)}{logged}"]
        after = f" after step {taken}," if taken else ""
        return "run", [f"{status}{after} before its first checkpoint"]


def _changed_files(record: dict, now: dict) -> list[str]:
    """Return ``members/signals/mine.py changed`` of each file of one's own that is another now."""
    old, new = record.get("members", {}), now.get("members", {})
    both = sorted(old.keys() & new.keys())
    return [f"members/{path} changed" for path in both if old[path] != new[path]]


def ready(
    recipe: Recipe, run: RunDir | None = None, public: bool = True
) -> tuple[list[str], dict[str, str]]:
    """Return the stages that can be checked, and ``{stage: reason}`` of those that must wait.

    Only stages that use teachers or servers are checked; one can be where its models all exist.

    Args:
        run: a run directory whose finished stages count as there.
        public: whether a public name counts as there; it may have to be fetched.
    """
    now, later = [], {}
    config: Any
    for stage, config in recipe.stages.items():
        teachers = config.teachers
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
    """Return whether a server writes texts for a stage, scores them or judges them."""
    verifiers = [n for d in recipe.domains(stage) for n in recipe.data[d].verifier]
    return any(member("verifiers", name).asks_server for name in verifiers) or any(
        references.parse(text).form == "server" for _, text in recipe.references(stage)
    )


def needed(recipe: Recipe, *stages: str) -> set[str]:
    """Return stages and everything they read, directly or not."""
    names: set[str] = set()
    waiting = list(stages)
    while waiting:
        name = waiting.pop()
        if name not in names:
            names.add(name)
            waiting += recipe.upstream(name)
    return names
