"""Carry out a plan: each stage in a process of its own, independent stages side by side.

The parent never imports torch. On a CPU a stage is forked from a server that has imported torch
and transformers and done nothing else; on a GPU it is spawned. A failed stage stops what depends
on it; the others finish. SIGINT and SIGTERM are passed on, and each stage commits a checkpoint.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from opdctl.errors import EXIT_INTERRUPTED, EXIT_USAGE, StageFailed, UsageError
from opdctl.recipe.recipe import Recipe
from opdctl.recipe.yaml_lines import dump
from opdctl.run.launch import new_run
from opdctl.run.plan import Planned, plan
from opdctl.run.rundir import RunDir, read_json
from opdctl.types import Finding


@dataclass
class Job:
    """One run to carry out."""

    run: RunDir
    recipe: Recipe
    planned: list[Planned]
    status: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, run: RunDir, recipe: Recipe, only: tuple[str, ...] = ()) -> Job:
        """A job for what is not done yet."""
        planned = plan(recipe, run, only)
        return cls(
            run,
            recipe,
            planned,
            {p.name: "done" if p.action == "skip" else "pending" for p in planned},
        )


@dataclass
class Outcome:
    """How it ended.

    Attributes:
        code: 0, or the exit code of what went wrong first.
        failed: (run, stage) of each failure.
    """

    code: int = 0
    failed: list[tuple[RunDir, str]] = field(default_factory=list)


def slots(recipe: Recipe) -> int:
    """Stages to run at once: as the cores allow on a CPU, one on a GPU, unless ``jobs`` says."""
    cores = len(os.sched_getaffinity(0)) // recipe.runtime.threads
    return recipe.runtime.jobs or (max(1, cores) if on_cpu(recipe) else 1)


def on_cpu(recipe: Recipe) -> bool:
    """Whether stages will run on a CPU; found out without importing torch."""
    device = recipe.runtime.device
    return device == "cpu" or (device == "auto" and not os.path.exists("/dev/nvidiactl"))


def carry_out(jobs: list[Job], watch: Callable[[list[Job]], None]) -> Outcome:
    """Run every pending stage of every job, ``slots`` at a time.

    Args:
        watch: called with the jobs many times a second, to show progress.
    """
    outcome = Outcome()
    launcher = _Launcher(jobs[0].recipe)
    running: dict[tuple[int, str], _Process] = {}
    stopping = False

    def ask(*_) -> None:
        nonlocal stopping
        stopping = True
        for process in running.values():
            process.stop()

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            if not stopping:
                for index, stage in _ready(jobs)[: slots(jobs[0].recipe) - len(running)]:
                    jobs[index].status[stage] = "running"
                    running[index, stage] = launcher.start(jobs[index].run, stage)
                    if stopping:  # asked while the fork server was importing torch
                        running[index, stage].stop()
                        break
            if not running:
                break
            time.sleep(0.02)
            for (index, stage), process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[index, stage]
                _note(jobs[index], stage, code, outcome)
            watch(jobs)
    finally:
        for process in running.values():
            process.kill()
        for number, action in before.items():
            signal.signal(number, action)
    interrupted = any("interrupted" in job.status.values() for job in jobs)
    if (stopping or interrupted) and not outcome.failed:
        outcome.code = EXIT_INTERRUPTED
    return outcome


def examine(
    recipe: Recipe, stages: list[str], run: RunDir | None = None, deep: bool = False
) -> list[Finding]:
    """What ``preflight/`` says of stages whose models are all there, found in one worker.

    The recipe is put into a run directory that is thrown away, with links to the outputs of ``run``
    in it: nothing is written to ``run``.

    Args:
        deep: sample too.

    Raises:
        StageFailed: the worker broke down; what it said went to stderr.
    """
    if not stages:
        return []
    asked = ["--preflight", "deep" if deep else "cheap", *stages]
    found = _apart(recipe, run, asked, "preflight.json", list)
    return [Finding(**f) for f in found]


def diagnose(
    recipe: Recipe, stages: list[str], run: RunDir | None = None, effort: dict | None = None
) -> list[dict]:
    """What ``diagnosis/`` measures of stages whose models are all there, likewise.

    Args:
        effort: what it may cost, see ``checks/diagnosis/measure.py``.

    Raises:
        StageFailed: a server does not answer; or the worker broke down, and what it said went to
            stderr.
        UsageError: a model or the prompts of a stage cannot be read.
    """
    asked = ["--diagnose", json.dumps(effort or {}), *stages]
    found = _apart(recipe, run, asked, "diagnosis.json", dict)
    if "error" in found:
        usage, message, hint = found["error"]
        raise (UsageError if usage else StageFailed)(message, hint)
    return found["stages"]


def _apart(
    recipe: Recipe, run: RunDir | None, asked: list[str], result: str, kind: type
) -> list | dict:
    """Ask a worker about a recipe put into a run directory that is thrown away, with links to the
    outputs of ``run`` in it; what it left in ``result``."""
    with tempfile.TemporaryDirectory(prefix="opdctl-") as folder:
        made = new_run(recipe, dump(recipe.to_dict()), Path(folder) / "run")
        for name in recipe.stages if run else ():
            if run.record(name).get("status") == "done" and run.output(name).is_dir():
                made.output(name).symlink_to(run.output(name), target_is_directory=True)
        worker = subprocess.Popen(
            [sys.executable, "-m", "opdctl.process.worker", str(made.path), *asked],
            stdin=subprocess.PIPE,  # it ends when this process does
            stdout=sys.stderr.fileno(),
        )
        try:
            code = worker.wait()
        finally:
            worker.kill()
            worker.stdin.close()
        found = read_json(made / result, kind)
        if code or found is None:
            raise StageFailed(
                f"the checks of {', '.join(asked[2:])} ended with exit code {code}",
                "what they said stands above",
            )
    return found


def _ready(jobs: list[Job]) -> list[tuple[int, str]]:
    """(job, stage) that may start; the earliest in a recipe first, as most may wait for it."""
    found = []
    for index, job in enumerate(jobs):
        done = {s for s, status in job.status.items() if status == "done"}
        for place, planned in enumerate(job.planned):
            if job.status[planned.name] == "pending" and set(planned.upstream) <= done:
                found.append((place, index, planned.name))
    return [(index, stage) for _, index, stage in sorted(found)]


def _note(job: Job, stage: str, code: int, outcome: Outcome) -> None:
    if code == 0:
        job.status[stage] = "done"
    elif code in (EXIT_INTERRUPTED, -signal.SIGTERM):  # the latter: asked before it could listen
        job.status[stage] = "interrupted"
    else:
        job.status[stage] = "failed"
        outcome.failed.append((job.run, stage))
        outcome.code = code if code in (1, EXIT_USAGE, 4) else 1


class _Process:
    """A forked or spawned worker."""

    def __init__(self, process) -> None:
        self.process = process
        self.pid = process.pid

    def poll(self) -> int | None:
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll()
        return self.process.exitcode

    def stop(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class _Launcher:
    """Starts workers: forked on a CPU, spawned otherwise."""

    def __init__(self, recipe: Recipe) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", str(recipe.runtime.threads))
        self.forking = on_cpu(recipe)
        if self.forking:
            self.context = multiprocessing.get_context("forkserver")
            # a child imports the main module again: what that loaded of ours is loaded before
            loaded = sorted(name for name in sys.modules if name.startswith("opdctl."))
            self.context.set_forkserver_preload(["opdctl.process.warm", *loaded])

    def start(self, run: RunDir, stage: str) -> _Process:
        from opdctl.process.worker import child

        log = run / "logs" / "latest"
        if self.forking:
            process = self.context.Process(target=child, args=(str(run.path), stage, str(log)))
            process.start()
            return _Process(process)
        with open(log, "ab") as file:
            command = [
                sys.executable,
                "-m",
                "opdctl.process.worker",
                str(run.path),
                stage,
                "--follow-stdin",
            ]
            return _Process(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=file)
            )
