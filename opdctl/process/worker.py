"""The process that runs one stage of one run directory. Its only input is that directory.

    python -m opdctl.process.worker DIR STAGE
    python -m opdctl.process.worker DIR --preflight cheap|deep STAGE ...
    python -m opdctl.process.worker DIR --diagnose EFFORT STAGE ...

The other forms run no stage: they write the findings of the checks to ``preflight.json``, or the
measurements of a diagnosis, with its limits EFFORT in JSON, to ``diagnosis.json``.

Exit codes: 0 done, 75 stopped with a checkpoint committed, 2 bad input, 1 failed, 4 busy. The
process ends when its parent does, whatever the parent died of.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path

from opdctl.checks.preflight._run_checks import check, finding_lines, raise_errors
from opdctl.config.registry import member
from opdctl.config.secrets import masked
from opdctl.errors import EXIT_FAILED, EXIT_USAGE, Interrupted, OpdctlError, UsageError
from opdctl.process.same_bits import other_settings, require_same, settings_of
from opdctl.process.streams import outlive_the_terminal
from opdctl.run import provenance
from opdctl.run.fingerprint import fingerprints, is_stale, member_record, revisions, semantic
from opdctl.run.launch import read_recipe
from opdctl.run.rundir import RunDir, clear_stage, drop_checkpoints, last_step, lock, write_json
from opdctl.train.context import Context
from opdctl.types import Finding

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def run_stage(folder: str, stage: str) -> int:
    """Run a stage to its end, and record the result in ``stage.json``. Return the exit code."""
    run = RunDir(folder)
    start = time.perf_counter()
    ctx = Context(run, read_recipe(run, trusted=True), stage)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: setattr(ctx, "stop", True))
    try:
        with lock(run.stage(stage) / ".lock", f"stage {stage} of {run.path}"):
            return _attempt(ctx, start)
    except OpdctlError as error:
        print(f"[{stage}] {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except OSError as error:  # not even its record could be written
        with contextlib.suppress(OSError):
            print(f"[{stage}] {disk_message(run.stage(stage), error)}", file=sys.stderr, flush=True)
        return EXIT_FAILED


def is_disk_error(error: Exception) -> bool:
    """Return True where the disk refused a write; safetensors says so in its message only."""
    return getattr(error, "errno", None) in DISK or "(os error" in str(error)


def disk_message(folder: Path, error: Exception) -> str:
    """Return the message for a disk that refuses a write."""
    return f"cannot write under {folder}: {error}\n  make room on that disk, then resume"


def _attempt(ctx: Context, start: float) -> int:
    """Run one attempt of a stage and record it. Return the exit code."""
    before = ctx.run.record(ctx.name)
    fingerprint = fingerprints(ctx.recipe)[ctx.name]
    if is_stale(before, fingerprint):
        clear_stage(ctx.folder)  # made from other inputs: nothing of it may be used
        before = {}
    ctx.attempt = before.get("attempt", 0) + 1
    record = _new_record(ctx, before, fingerprint, time.perf_counter() - start)
    path = ctx.folder / "stage.json"
    passed = before.get("preflight")
    if passed is None or any(f["severity"] == "error" for f in passed):
        ctx.inspect = lambda student: _preflight(ctx, student, record, path)
    else:
        record["preflight"] = passed  # of an earlier attempt: the models are the same
    write_json(path, record)
    code, problem = _run_recorded(ctx, before, record, path)
    if code and not last_step(ctx.folder / "metrics.jsonl"):
        record["inputs"] = _used(ctx, code, before.get("inputs", {}), record["inputs"])
    if ctx.prompts.counts:
        record["data"] = ctx.prompts.counts
    if problem:
        problem = masked(problem)
        record |= {"status": "failed", "error": problem}
        with contextlib.suppress(OSError):  # a log on a full disk
            print(f"[{ctx.name}] {problem}", file=sys.stderr, flush=True)
    spent = time.perf_counter() - start
    record["attempts"] = [
        *record["attempts"],
        {"started": time.time() - spent, "seconds": spent, "loop_seconds": ctx.loop_seconds},
    ]
    record["seconds"] += spent
    record["loop_seconds"] += ctx.loop_seconds
    write_json(path, record)
    if code == 0:
        drop_checkpoints(ctx.folder)  # not before: a kill in between would begin the stage again
    return code


def _used(ctx: Context, code: int, before: dict, now: dict) -> dict:
    """Return those inputs of an attempt without a step that something was made from.

    A server that failed, or that was found to be the wrong one, may be put right.
    """
    if code == EXIT_USAGE and not (ctx.folder / "metrics.jsonl").exists():
        return before  # the loop has not begun
    used = {}
    for dotted, entry in now.items():
        teacher = re.fullmatch(r"teachers\.(.+)\.model", dotted)
        begins = f"teacher {teacher[1]} " if teacher else "answer"
        if "served" not in entry or (ctx.wal is not None and ctx.wal.holds(begins)):
            used[dotted] = entry
        elif dotted in before:
            used[dotted] = before[dotted]
    return used


def _new_record(ctx: Context, before: dict, fingerprint: str, spent: float) -> dict:
    """Return the record of an attempt as it begins, with the totals of earlier attempts.

    Args:
        spent: seconds since its process began.
    """
    return {
        "name": ctx.name,
        "kind": ctx.config.kind,
        "status": "running",
        "fingerprint": fingerprint,
        "attempt": ctx.attempt,
        "began": time.time() - spent,
        "total": ctx.recipe.total(ctx.name),
        "semantic": semantic(ctx.recipe, ctx.name),
        "revisions": revisions(ctx.recipe, ctx.name),
        **member_record(ctx.recipe, ctx.name),
        "attempts": before.get("attempts", []),
        "seconds": before.get("seconds", 0.0),
        "loop_seconds": before.get("loop_seconds", 0.0),
        "seed": {"run": ctx.recipe.seed, "stage": ctx.seed},
        "versions": provenance.versions(),
        "code": provenance.code(),
        "inputs": before.get("inputs", {}),
        "data": before.get("data", {}),
    }


def _run_recorded(ctx: Context, before: dict, record: dict, path: Path) -> tuple[int, str | None]:
    """Run the stage and put its results into ``record``. Return the exit code and the error."""
    try:
        prepare(ctx)
        record["settings"] = settings_of(ctx.device, record["versions"])
        lines = other_settings(ctx.run, ctx.recipe, ctx.name, before, record["settings"])
        require_same(ctx.run, ctx.recipe, ctx.name, lines)
        record["rounding"] = [*before.get("rounding", []), *lines]
        inputs = provenance.inputs(ctx.run, ctx.recipe, ctx.name, ctx.check)
        provenance.require_unchanged(ctx.run, ctx.recipe, ctx.name, inputs)
        record["inputs"] = inputs
        write_json(path, record)
        compute = member("stages", ctx.config.kind)().run(ctx)
        record |= {"status": "done", "compute": asdict(compute)}
        record |= {"output": provenance.model(ctx.run.output(ctx.name))}
    except Interrupted as stopped:
        record["status"] = "interrupted"
        return stopped.exit_code, None
    except OpdctlError as error:
        return error.exit_code, str(error)
    except Exception as error:  # the boundary of the process: recorded, then reported
        if is_disk_error(error):
            return EXIT_FAILED, disk_message(ctx.folder, error)
        traceback.print_exc()
        return EXIT_FAILED, f"{type(error).__name__}: {error}"
    return 0, None


def prepare(ctx: Context) -> None:
    """Configure torch by ``runtime``: threads, type, device; no progress bars.

    Raises:
        UsageError: the device of ``runtime.device`` does not exist.
    """
    import torch
    from transformers.utils import logging

    from opdctl.models.model import pick_device

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(ctx.runtime.threads)
    torch.set_default_dtype(torch.float64 if ctx.runtime.dtype == "float64" else torch.float32)
    ctx.device = pick_device(ctx.runtime.device)


def _preflight(ctx: Context, student, record: dict, path: Path) -> None:
    """Run the cheap checks before the first step: record all, log warnings, raise errors."""
    findings = check(ctx, student)
    record["preflight"] = [asdict(f) for f in findings if f.severity != "ok"]
    write_json(path, record)
    for finding in findings:
        if finding.severity == "warning":
            print(f"[{ctx.name}] warning: {finding_lines(finding)}", flush=True)
    raise_errors(findings)


def examine(folder: str, depth: str, *stages: str) -> int:
    """Check stages whose models exist, deep or cheap. Return the exit code."""
    run, findings = RunDir(folder), []
    recipe = read_recipe(run, trusted=True)
    for stage in stages:
        print(f"checking {stage}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as aside:  # what it samples is no part of the run
            ctx = Context(run, recipe, stage, log_folder=Path(aside))
            try:
                prepare(ctx)
                findings += check(ctx, deep=depth == "deep")
            except UsageError as error:
                wrong = Finding("error", error.message, error.hint, stage=stage, check="device")
                why = "a stage cannot run where it cannot be checked"
                findings.append(replace(wrong, why=why))
    write_json(run / "preflight.json", [asdict(f) for f in findings])
    return 0


def diagnose(folder: str, effort: str, *stages: str) -> int:
    """Measure stages whose models exist. Return the exit code."""
    from opdctl.checks.diagnosis.measure import Effort, measure

    run, result = RunDir(folder), {"stages": []}
    recipe = read_recipe(run, trusted=True)
    try:
        for stage in stages:
            with tempfile.TemporaryDirectory() as aside:
                ctx = Context(run, recipe, stage, log_folder=Path(aside))
                prepare(ctx)
                result["stages"].append(measure(ctx, Effort(**json.loads(effort))))
    except OpdctlError as error:
        result["error"] = [error.exit_code == EXIT_USAGE, error.message, error.hint]
    write_json(run / "diagnosis.json", result)
    return 0


def child(folder: str, stage: str, log: str) -> None:
    """Run a stage in a forked worker: log to a file, end with the parent."""
    import multiprocessing

    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    outlive_the_terminal()  # its log may be on a disk that is full
    parent = multiprocessing.parent_process()
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    code = run_stage(folder, stage)
    sys.stdout.flush()
    os._exit(code)  # no interpreter teardown: everything is on disk


def _end_with_parent(parent) -> None:
    parent.join()
    os._exit(EXIT_FAILED)


def _end_with_stdin() -> None:
    """End with the process at the other end of the pipe."""
    while os.read(0, 4096):  # not sys.stdin: its lock would abort an interpreter that ends first
        pass
    os._exit(EXIT_FAILED)


if __name__ == "__main__":
    asides = {"--preflight": examine, "--diagnose": diagnose}
    aside = asides.get(sys.argv[2]) if len(sys.argv) > 4 else None
    if not (aside or len(sys.argv) in (3, 4)) or not Path(sys.argv[1]).is_dir():
        usage = "DIR STAGE | DIR --preflight cheap|deep STAGE ... | DIR --diagnose EFFORT STAGE ..."
        sys.exit(f"usage: python -m opdctl.process.worker {usage}")
    if aside or sys.argv[3:] == ["--follow-stdin"]:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    if aside:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to take
    sys.exit(aside(sys.argv[1], *sys.argv[3:]) if aside else run_stage(*sys.argv[1:3]))
