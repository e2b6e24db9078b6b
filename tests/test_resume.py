"""Kill a real run anywhere, resume it, and get the same bits."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from opdctl.run.rundir import RunDir, held, read_json, read_rows, write_json
from running import DEMO, assert_same, inside, start, worker

SIGKILL = "import os, signal; die = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
IN_SAMPLING = (
    SIGKILL
    + """
import opdctl.rollout.engines.transformers as engine
real, seen = engine.draw_tokens, []
def draw(*a):
    seen.append(1)
    if len(seen) == {n}:
        die()
    return real(*a)
engine.draw_tokens = draw
"""
)
IN_CHECKPOINT = (
    SIGKILL
    + """
import opdctl.models.tensor_file as tensor_file
real, seen = tensor_file.save_file, []
def save_file(*a, **k):
    seen.append(1)
    if len(seen) == {n}:
        die()
    return real(*a, **k)
tensor_file.save_file = save_file
"""
)
IN_COMMIT = (
    SIGKILL
    + """
import opdctl.train.checkpoint as checkpoint
real, seen = checkpoint.commit_folder, []
def commit_folder(*a):
    real(*a)
    seen.append(1)
    if len(seen) == {n}:
        die()
checkpoint.commit_folder = commit_folder
"""
)
IN_EXPORT = (
    SIGKILL
    + """
import opdctl.models.model as models
real = models.save
def save(model, folder):
    real(model, folder)
    die()
models.save = save
"""
)


BEFORE_RECORD = (
    SIGKILL
    + """
import opdctl.process.worker as worker
real = worker.write_json
def write_json(path, record):
    if record["status"] == "done":
        die()
    real(path, record)
worker.write_json = write_json
"""
)


def copy_without(source, target, stage):
    """The run as it was before a stage: its inputs done, itself not begun."""
    shutil.copytree(source, target, symlinks=True)
    folder = RunDir(target).stage(stage)
    for path in folder.iterdir():
        if path.name != "config.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("stage", "patch", "n"),
    [
        ("base", IN_CHECKPOINT, 6),
        ("base", IN_EXPORT, 0),
        ("sft", IN_COMMIT, 1),
        ("t_math", IN_SAMPLING, 9),
        ("t_math", IN_CHECKPOINT, 4),
        ("orm", IN_SAMPLING, 14),
        ("mopd", IN_SAMPLING, 20),
        ("mopd", IN_COMMIT, 2),
        ("full", IN_SAMPLING, 12),
        ("distilled", IN_SAMPLING, 15),
        ("eval_mopd", IN_SAMPLING, 8),
    ],
)
def test_killed_at_a_chosen_point(demo_run, tmp_path, stage, patch, n):
    copy_without(demo_run[0], tmp_path / "run", stage)
    killed = worker(tmp_path / "run", stage, patch.replace("{n}", str(n)))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert RunDir(tmp_path / "run").record(stage)["status"] == "running"
    assert worker(tmp_path / "run", stage).returncode == 0
    assert RunDir(tmp_path / "run").record(stage)["attempt"] == 2
    assert_same(demo_run[0], tmp_path / "run", [stage])


def test_killed_before_it_is_recorded_as_done(demo_run, tmp_path):
    """The output stands and the record does not: the stage goes on from its checkpoint."""
    copy_without(demo_run[0], tmp_path / "run", "base")
    assert worker(tmp_path / "run", "base", BEFORE_RECORD).returncode == -signal.SIGKILL
    assert worker(tmp_path / "run", "base").returncode == 0
    assert_same(demo_run[0], tmp_path / "run", ["base"])
    rows = read_rows(RunDir(tmp_path / "run").stage("base") / "metrics.jsonl")
    assert [r["attempt"] for r in rows] == [1] * 10 + [2] * 2
    assert not (RunDir(tmp_path / "run").stage("base") / "checkpoints").exists()


def test_a_truncated_checkpoint_falls_back(demo_run, tmp_path):
    copy_without(demo_run[0], tmp_path / "run", "mopd")
    worker(tmp_path / "run", "mopd", IN_COMMIT.replace("{n}", "2"))
    newest = sorted((RunDir(tmp_path / "run").stage("mopd") / "checkpoints").glob("step-*"))[-1]
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    done = worker(tmp_path / "run", "mopd")
    assert done.returncode == 0 and "cannot be read" in done.stdout
    assert_same(demo_run[0], tmp_path / "run", ["mopd"])


def stop_when(process, condition, number, group=False):
    """Send a signal once ``condition()`` holds; returns the exit code."""
    deadline = time.time() + 120
    while not condition() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be stopped"
    if group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    return process.wait(60)


def let_go(lock):
    """Wait until a lock's holder has ended: a signal does not wait for the processes it kills."""
    deadline = time.time() + 20
    while held(lock) and time.time() < deadline:
        time.sleep(0.05)
    assert not held(lock)


def test_kill_and_interrupt_the_whole_command(demo_run, tmp_path):
    """SIGKILL of the process group, SIGTERM and SIGINT of the command, in three stages."""
    folder = tmp_path / "run"
    run = RunDir(folder)

    def rows_of(stage, count):
        path = run.stage(stage) / "metrics.jsonl"
        return lambda: path.exists() and path.read_text().count("\n") >= count

    assert (
        stop_when(
            start("run", DEMO, "--out", folder), rows_of("base", 3), signal.SIGKILL, group=True
        )
        == -signal.SIGKILL
    )
    let_go(run / ".lock")
    found = inside("status", folder, "--json")
    assert '"state": "interrupted"' in found.stdout
    assert stop_when(start("resume", folder), rows_of("t_math", 2), signal.SIGTERM) == 75
    assert run.record("t_math")["status"] in ("interrupted", "done")
    assert stop_when(start("resume", folder), rows_of("mopd", 2), signal.SIGINT) == 75
    done = inside("resume", folder)
    assert done.returncode == 0, done.stderr
    stages = list(read_json(folder / "run.json")["fingerprints"])
    assert_same(demo_run[0], folder, stages)


def test_workers_die_with_their_parent(tmp_path):
    folder = tmp_path / "run"
    process = start("run", DEMO, "--out", folder, "stages.base.steps=2000")
    lock = RunDir(folder).stage("base") / ".lock"
    stop_when(
        process, lambda: RunDir(folder).record("base").get("status") == "running", signal.SIGKILL
    )
    let_go(lock)


def test_a_worker_stopped_alone_is_not_success(tmp_path):
    folder = tmp_path / "run"
    process = start("run", DEMO, "--out", folder, "stages.base.steps=500")
    lock, metrics = (RunDir(folder).stage("base") / n for n in (".lock", "metrics.jsonl"))
    deadline = time.time() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.time() < deadline:
        time.sleep(0.02)
    os.kill(int(lock.read_text().split()[1]), signal.SIGTERM)
    assert process.wait(60) == 75
    assert RunDir(folder).record("base")["status"] == "interrupted"


def test_a_stop_while_the_first_stage_is_being_started_is_heeded(tmp_path):
    """The fork server imports torch for seconds; nobody could be told to stop in that time."""
    folder = tmp_path / "run"
    process = start("run", DEMO, "--out", folder, "stages.base.steps=100000")
    status = Path(f"/proc/{process.pid}/status")

    def listens():
        caught = re.search(r"SigCgt:\s*(\w+)", status.read_text())[1]
        return int(caught, 16) >> (signal.SIGTERM - 1) & 1

    code = stop_when(process, listens, signal.SIGTERM)
    assert code == 75 and RunDir(folder).record("base").get("status") in (None, "interrupted")


def test_a_changed_input_leaves_nothing_behind(demo_run, tmp_path):
    """Finished domains and checkpoints of other inputs are not used again."""
    copy_without(demo_run[0], tmp_path / "run", "eval_mopd")
    run = RunDir(tmp_path / "run")
    part = run.stage("eval_mopd") / "parts" / "math.json"
    write_json(part, {**read_json(demo_run[0] / "stages/eval_mopd/parts/math.json"), "accuracy": 9})
    write_json(run.stage("eval_mopd") / "stage.json", {"fingerprint": "other", "status": "running"})
    assert worker(tmp_path / "run", "eval_mopd").returncode == 0
    assert_same(demo_run[0], tmp_path / "run", ["eval_mopd"])


@pytest.mark.parametrize("content", ["[1]", "5", "null", '{"a": 1}', "{", "\xff"])
@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "stages/sft/stage.json",
        "resolved.yaml",
        "stages/eval_sft/results.json",
        "stages/sft/metrics.jsonl",
    ],
)
def test_damaged_files_are_named_not_traced(demo_run, tmp_path, name, content):
    shutil.copytree(demo_run[0], tmp_path / "run", symlinks=True)
    (tmp_path / "run" / name).write_bytes(content.encode("latin-1"))
    for command in ("status", "claims", "report", "plan"):
        done = inside(command, tmp_path / "run")
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr, (command, done.stderr)


def test_two_at_once_and_foreign_directories(demo_run, tmp_path):
    from opdctl.run.rundir import lock

    with lock(demo_run[0] / ".lock", "test"):
        busy = inside("resume", demo_run[0])
    assert busy.returncode == 4 and f"pid {os.getpid()}" in busy.stderr
    again = inside("run", DEMO, "--out", demo_run[0])
    assert again.returncode == 2 and "--from" in again.stderr and "resume" in again.stderr
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("precious")
    foreign = inside("run", DEMO, "--out", tmp_path / "foreign")
    assert foreign.returncode == 2 and "not a run directory" in foreign.stderr
    assert [p.name for p in (tmp_path / "foreign").iterdir()] == ["thesis.txt"]
    assert inside("resume", tmp_path / "foreign").returncode == 2
    assert inside("resume", tmp_path / "nowhere").returncode == 2


def test_resume_refuses_semantic_changes(demo_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(demo_run[0], run, symlinks=True)
    before = (run / "resolved.yaml").read_text()
    refused = inside("resume", run, "stages.mopd.optim.lr=0.5")
    assert refused.returncode == 2 and "--from" in refused.stderr
    assert "stages.mopd.optim.lr: 0.001 -> 0.5" in refused.stderr
    named = inside("resume", run, "claims.M1=null", "runtime.rollout_batch=7")
    assert named.returncode == 2 and "claims.M1" in named.stderr
    assert (run / "resolved.yaml").read_text() == before
    allowed = inside("resume", run, "runtime.checkpoint_every=3")
    assert allowed.returncode == 0 and "every stage is done" in allowed.stderr


def test_from_reuses_what_stays_the_same(demo_run, tmp_path):
    planned = inside("plan", DEMO, "stages.mopd.optim.lr=0.002", "--from", demo_run[0], "--json")
    actions = {s["name"]: s for s in __import__("json").loads(planned.stdout)["stages"]}
    assert actions["sft"]["action"] == "skip" and actions["mopd"]["action"] == "rerun"
    assert actions["mopd"]["reasons"] == ["stage.optim.lr: 0.001 -> 0.002"]
    assert actions["eval_mopd"]["action"] == "rerun" and actions["eval_sft"]["action"] == "skip"
    done = inside(
        "run", DEMO, "stages.mopd.optim.lr=0.002", "--from", demo_run[0], "--out", tmp_path / "new"
    )
    assert done.returncode == 0, done.stderr
    new, old = RunDir(tmp_path / "new"), RunDir(demo_run[0])
    assert new.record("sft")["reused_from"] == str(old.path)
    assert "reused_from" not in new.record("mopd")
    weights = [r.output("mopd") / "model.safetensors" for r in (new, old)]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    assert inside("plan", tmp_path / "new", "--exit-code").returncode == 0
    assert inside("plan", DEMO, "--exit-code").returncode == 3
