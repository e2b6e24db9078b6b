"""Real runs for the tests: the command line in processes of its own, and comparison of runs."""

import contextlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

from breaking import another, aside, broken
from hostile import command
from opdctl.config.registry import member
from opdctl.process import runner
from opdctl.recipe.recipe import resolve
from opdctl.run.launch import new_run
from opdctl.run.rundir import VOLATILE, RunDir, read_rows
from opdctl.train.context import Context

HERE = Path(__file__).parent
DEMO = HERE / "demo.yaml"


def opdctl(*arguments, cwd=None, **options):
    """Run the command; output captured."""
    words = [sys.executable, "-m", "opdctl", *map(str, arguments)]
    return subprocess.run(
        words, cwd=cwd or HERE.parent, capture_output=True, text=True, timeout=300, **options
    )


def inside(*arguments, cwd=None):
    """The command in this process, for tests of what it says or leaves: torch is imported once for
    all of them. Its workers are processes as ever, forked from one warm server."""
    runner.subprocess = types.SimpleNamespace(Popen=Aside, PIPE=subprocess.PIPE)
    try:
        with contextlib.chdir(cwd or HERE.parent):
            code, out, err = command(*arguments)
    finally:
        runner.subprocess = subprocess
    return subprocess.CompletedProcess(arguments, code, out, err)


class Aside:
    """The process that checks or measures stages for a command, forked from the warm server where
    the command would start a new interpreter. ``opdctl`` above starts it as a user's does."""

    def __init__(self, words, stdin, stdout):
        self.stdin, self.stderr = io.BytesIO(), stdout
        self.words = words[words.index("opdctl.process.worker") + 1 :]

    def wait(self):
        with tempfile.TemporaryDirectory() as folder:
            done = forked(Path(folder) / "log", aside, list(map(str, self.words)))
        os.write(self.stderr, done.stdout.encode())
        return done.returncode

    def kill(self):
        """Nothing: it has ended."""


def start(*arguments):
    """Start the command in a process group of its own."""
    words = [sys.executable, "-m", "opdctl", *map(str, arguments)]
    return subprocess.Popen(
        words,
        cwd=HERE.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def worker(folder, stage, patch=""):
    """Run one stage's worker, forked from a warm server, after ``patch``: source that may break
    it on purpose. Returns its exit code and what it printed."""
    log = Path(folder) / "logs" / "test.log"
    log.parent.mkdir(exist_ok=True)
    return forked(log, broken, str(folder), stage, patch)


def elsewhere(folder, code, *words, paths):
    """Run code with the opdctl that stands under the first of the paths, as a program in a folder:
    a process that is spared the import of torch, and no more. Returns its exit code and output."""
    places = [str(p) for p in paths]
    return forked(folder / "elsewhere.log", another, str(folder), places, [*map(str, words)], code)


def forked(log, body, *arguments):
    """Run a function of ``breaking`` in a fork of the warm server; it prints to a log."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["opdctl.process.warm"])
    log.unlink(missing_ok=True)
    process = context.Process(target=body, args=(*arguments, str(log)))
    process.start()
    process.join(300)
    return subprocess.CompletedProcess([], process.exitcode, log.read_text(), "")


def one_stage(folder, data, *overrides, context=Context, runtime=None, **stage):
    """Context of the stage ``it`` in a new run directory: what a worker makes before it runs."""
    tree = {"name": "one", "data": data, "stages": {"it": stage}, "runtime": runtime or {}}
    recipe = resolve(tree, "one", overrides=overrides)
    return context(new_run(recipe, "", Path(folder)), recipe, "it")


def carry_out(ctx):
    """The stage in this process; its metrics."""
    member("stages", ctx.config.kind)().run(ctx)
    return read_rows(ctx.folder / "metrics.jsonl")


def plain(row):
    """A metrics row without the fields that time, host or memory determine."""
    return {k: v for k, v in row.items() if k not in VOLATILE}


def assert_same(run_a, run_b, stages):
    """Outputs byte for byte, metrics row for row, results and ledgers."""
    a, b = RunDir(run_a), RunDir(run_b)
    for stage in stages:
        ours = {p.name: p.read_bytes() for p in sorted(a.output(stage).glob("*"))}
        theirs = {p.name: p.read_bytes() for p in sorted(b.output(stage).glob("*"))}
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == theirs[name], f"{stage}/output/{name}"
        rows = [[plain(r) for r in read_rows(run.stage(stage) / "metrics.jsonl")] for run in (a, b)]
        assert rows[0] and rows[0] == rows[1], stage
        ledgers = [
            {k: v for k, v in run.record(stage)["compute"].items() if k != "seconds"}
            for run in (a, b)
        ]
        assert ledgers[0] == ledgers[1], stage
        results = [run.stage(stage) / "results.json" for run in (a, b)]
        assert results[0].exists() == results[1].exists()
        if results[0].exists():
            assert json.loads(results[0].read_text()) == json.loads(results[1].read_text())
