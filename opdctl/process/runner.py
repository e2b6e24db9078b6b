"""Carry out a plan: each stage in a process of its own, independent stages side by side.

The parent never imports torch. On a CPU a stage is forked from a server that has imported torch
and transformers and done nothing else; on a GPU it is spawned. A failed stage stops what depends
on it; the others finish. SIGINT, SIGTERM and SIGHUP end it: each stage commits a checkpoint.
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
from typing import TypeVar

from opdctl.errors import EXIT_INTERRUPTED, EXIT_USAGE, StageFailed, UsageError
from opdctl.recipe.recipe import Recipe
from opdctl.recipe.yaml_lines import dump
from opdctl.run.launch import new_run
from opdctl.run.plan import Planned, plan
from opdctl.run.rundir import RunDir, read_json
from opdctl.types import Finding

Content = TypeVar("Content", list, dict)


@dataclass
class Job:
    """One run to carry out, with the status of each of its stages."""

    run: RunDir
    recipe: Recipe
    planned: list[Planned]
    status: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, run: RunDir, recipe: Recipe, only: tuple[str, ...] = ()) -> Job:
        """Return the job of a run's unfinished stages, or of ``only`` and the stages they need."""
        planned = plan(recipe, run, only)
        return cls(
            run,
            recipe,
            planned,
            {p.name: "done" if p.action == "skip" else "pending" for p in planned},
        )


@dataclass
class Outcome:
    """The result of carrying out jobs.

    Attributes:
        code: 0, or the exit code of the last failure.
        failed: (run, stage) of each failure.
    """

    code: int = 0
    failed: list[tuple[RunDir, str]] = field(default_factory=list)


def slots(recipe: Recipe) -> int:
    """Return how many stages run at once: ``runtime.jobs``, else by cores on a CPU, 1 on a GPU."""
    cores = len(os.sched_getaffinity(0)) // recipe.runtime.threads
    return recipe.runtime.jobs or (max(1, cores) if on_cpu(recipe) else 1)


def on_cpu(recipe: Recipe) -> bool:
    """Return True where stages will run on a CPU; decided without importing torch."""
    device = recipe.runtime.device
    return device == "cpu" or (device == "auto" and not os.path.exists("/dev/nvidiactl"))


def carry_out(jobs: list[Job], watch: Callable[[list[Job]], None]) -> Outcome:
    """Run every pending stage of every job, ``slots`` at a time.

    Args:
        jobs: the runs; those of one set share a runtime.
        watch: called with the jobs many times a second, to show progress.
    """
    outcome = Outcome()
    launcher = _Launcher(jobs[0].recipe)
    running: dict[tuple[int, str], _Process] = {}
    stopping = False

    def request_stop(*_) -> None:
        nonlocal stopping
        stopping = True
        for process in running.values():
            process.stop()

    wanted = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup: it is to go on
        wanted.remove(signal.SIGHUP)
    old_handlers = {number: signal.signal(number, request_stop) for number in wanted}
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
                _record_exit(jobs[index], stage, code, outcome)
            watch(jobs)
    finally:
        for process in running.values():
            process.kill()
        for number, action in old_handlers.items():
            signal.signal(number, action)
    interrupted = any("interrupted" in job.status.values() for job in jobs)
    if (stopping or interrupted) and not outcome.failed:
        outcome.code = EXIT_INTERRUPTED
    return outcome


def examine(
    recipe: Recipe, stages: list[str], run: RunDir | None = None, deep: bool = False
) -> list[Finding]:
    """Run the checks of ``preflight/`` on stages whose models all exist, in one worker.

    The worker gets a temporary run directory with links to the outputs of ``run``: nothing is
    written to ``run``.

    Args:
        run: the run whose finished stages may be read.
        deep: run the checks that sample too.

    Raises:
        StageFailed: the worker crashed; its messages went to stderr.
    """
    if not stages:
        return []
    arguments = ["--preflight", "deep" if deep else "cheap", *stages]
    findings = _ask_worker(recipe, run, arguments, "preflight.json", list)
    return [Finding(**f) for f in findings]


def diagnose(
    recipe: Recipe, stages: list[str], run: RunDir | None = None, effort: dict | None = None
) -> list[dict]:
    """Run the diagnosis of these stages in a worker, as ``examine`` does with the checks.

    Args:
        effort: the limits, see ``checks/diagnosis/measure.py``.

    Raises:
        StageFailed: a server does not answer; or the worker crashed, its messages went to stderr.
        UsageError: a model or the prompts of a stage cannot be read.
    """
    arguments = ["--diagnose", json.dumps(effort or {}), *stages]
    result = _ask_worker(recipe, run, arguments, "diagnosis.json", dict)
    if "error" in result:
        usage, message, hint = result["error"]
        raise (UsageError if usage else StageFailed)(message, hint)
    return result["stages"]


def _ask_worker(
    recipe: Recipe, run: RunDir | None, arguments: list[str], file: str, kind: type[Content]
) -> Content:
    """Run a worker on a temporary run directory, and return the content of the file it writes.

    Args:
        run: the run whose outputs are linked into the temporary directory.
        arguments: the worker's arguments after the directory: an option, its value, stages.
        file: the name of the JSON file.
        kind: ``list`` or ``dict``, the type of its content.

    Raises:
        StageFailed: the worker ended with an error, or wrote no such file.
    """
    with tempfile.TemporaryDirectory(prefix="opdctl-") as folder:
        copy = new_run(recipe, dump(recipe.to_dict()), Path(folder) / "run")
        if run is not None:
            for name in recipe.stages:
                if run.record(name).get("status") == "done" and run.output(name).is_dir():
                    copy.output(name).symlink_to(run.output(name), target_is_directory=True)
        worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "opdctl.process.worker", str(copy.path), *arguments],
            stdin=subprocess.PIPE,  # it ends when this process does
            stdout=sys.stderr.fileno(),
        )
        try:
            code = worker.wait()
        finally:
            worker.kill()
            if worker.stdin is not None:
                worker.stdin.close()
        content = read_json(copy / file, kind)
        if code or content is None:
            raise StageFailed(
                f"the checks of {', '.join(arguments[2:])} ended with exit code {code}",
                "what they said stands above",
            )
    return content


def _ready(jobs: list[Job]) -> list[tuple[int, str]]:
    """Return the (job index, stage) that may start, those early in a recipe first: most other
    stages may wait for them."""
    startable = []
    for index, job in enumerate(jobs):
        done = {s for s, status in job.status.items() if status == "done"}
        for rank, planned in enumerate(job.planned):
            if job.status[planned.name] == "pending" and set(planned.upstream) <= done:
                startable.append((rank, index, planned.name))
    return [(index, stage) for _, index, stage in sorted(startable)]


def _record_exit(job: Job, stage: str, code: int, outcome: Outcome) -> None:
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
    """The means to start a worker: forked on a CPU, spawned otherwise."""

    def __init__(self, recipe: Recipe) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", str(recipe.runtime.threads))
        self.forking = on_cpu(recipe)
        if self.forking:
            self.context = multiprocessing.get_context("forkserver")
            # a child imports the main module again: what that loaded of ours is loaded before
            loaded = sorted(name for name in sys.modules if name.startswith("opdctl."))
            self.context.set_forkserver_preload(["opdctl.process.warm", *loaded])

    def start(self, run: RunDir, stage: str) -> _Process:
        """Start a stage. Neither it nor the fork server hears SIGHUP, which a closed terminal sends
        to all: this process does, and passes it on."""
        old = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
        try:
            return self._start(run, stage)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)

    def _start(self, run: RunDir, stage: str) -> _Process:
        from opdctl.process.worker import child

        log = run / "logs" / "latest"
        if self.forking:
            process = self.context.Process(target=child, args=(str(run.path), stage, str(log)))
            process.start()
            return _Process(process)
        with open(log, "ab") as file:
            command = [
                sys.executable,
                "-P",
                "-m",
                "opdctl.process.worker",
                str(run.path),
                stage,
                "--follow-stdin",
            ]
            return _Process(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=file)
            )
