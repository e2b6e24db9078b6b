"""The short form of benchmarks/torture.py, and what else may befall a run's directory."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_resume import copy_without

from opdctl.run.rundir import RunDir
from running import DEMO, assert_same, inside, worker

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))


def test_kills_at_random_instants(demo_run, tmp_path):
    from torture import torture

    phases, _, differ = torture(DEMO, [], 4, random.Random(7), tmp_path, demo_run[0])
    assert phases.total() == 4 and not differ


FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import opdctl.train.checkpoint as checkpoint
real = checkpoint.save
def save(*a, **k):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        real(*a, **k)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
checkpoint.save = save
"""


def test_a_disk_that_is_full_during_a_checkpoint(demo_run, tmp_path):
    """The file system refuses to write on: the stage fails in words, and resume goes on."""
    copy_without(demo_run[0], tmp_path / "run", "base")
    failed = worker(tmp_path / "run", "base", FULL)
    assert failed.returncode == 1 and "Traceback" not in failed.stdout
    assert f"cannot write under {RunDir(tmp_path / 'run').stage('base')}" in failed.stdout
    record = RunDir(tmp_path / "run").record("base")
    assert record["status"] == "failed" and "cannot write" in record["error"]
    assert not list((RunDir(tmp_path / "run").stage("base") / "checkpoints").glob("step-*"))
    assert worker(tmp_path / "run", "base").returncode == 0
    assert_same(demo_run[0], tmp_path / "run", ["base"])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB, where this machine lets us mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_really_full(small_disk):
    """A whole run on it: an error in words and how to go on; with room it does."""
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 2_300_000)
    failed = inside("run", DEMO, "--out", small_disk / "run")
    assert failed.returncode == 1 and "Traceback" not in failed.stderr, failed.stderr
    assert f"opdctl resume {small_disk / 'run'}" in failed.stderr
    assert "No space left" in failed.stderr
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    done = inside("resume", small_disk / "run")
    assert done.returncode == 0, done.stderr


def test_a_directory_that_cannot_be_written(demo_run, tmp_path):
    refused = inside("run", DEMO, "--out", "/proc/run")
    assert refused.returncode == 2 and "cannot write /proc/run" in refused.stderr
    shutil.copytree(demo_run[0], tmp_path / "run", symlinks=True)
    bind = ["mount", "--bind", "-o", "ro", tmp_path / "run", tmp_path / "run"]
    if os.geteuid() or subprocess.run(bind, capture_output=True).returncode:
        pytest.skip("a read-only mount is not allowed here")
    try:
        refused = inside("resume", tmp_path / "run")
        assert refused.returncode == 2 and "cannot write" in refused.stderr
        assert "Traceback" not in refused.stderr
        for command in ("status", "claims", "plan"):
            assert inside(command, tmp_path / "run").returncode == 0
    finally:
        subprocess.run(["umount", tmp_path / "run"], check=True)


BACKWARDS = """
import time
real = time.time
start = real()
time.time = lambda: 2 * start - real() - 1e6
"""


def test_a_clock_that_goes_backwards(demo_run, tmp_path):
    copy_without(demo_run[0], tmp_path / "run", "mopd")
    assert worker(tmp_path / "run", "mopd", BACKWARDS).returncode == 0
    record = RunDir(tmp_path / "run").record("mopd")
    assert record["seconds"] > 0 and all(a["seconds"] > 0 for a in record["attempts"])
    assert_same(demo_run[0], tmp_path / "run", ["mopd"])
    code = BACKWARDS + "import sys; from opdctl.cli.app import main; main()"
    words = [sys.executable, "-c", code, "resume", str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


SYNCED = """
import os
from pathlib import Path
sync, rename = os.fsync, Path.rename
def fsync(fd):
    sync(fd)
    print("synced", os.readlink(f"/proc/self/fd/{fd}"), flush=True)
def renamed(self, target):
    print("renamed", self, target, flush=True)
    return rename(self, target)
os.fsync, Path.rename = fsync, renamed
"""


def test_what_is_committed_is_on_the_disk_before_it_has_its_name(demo_run, tmp_path):
    """Power loss: every file and its folder synced, then the rename, then the folder above."""
    copy_without(demo_run[0], tmp_path / "run", "sft")
    lines = worker(tmp_path / "run", "sft", SYNCED).stdout.splitlines()
    events = [line.split() for line in lines if line.startswith(("synced ", "renamed "))]
    stage = RunDir(tmp_path / "run").stage("sft")
    commits = [
        (i, Path(e[1]), Path(e[2]))
        for i, e in enumerate(events)
        if e[0] == "renamed"
        and (Path(e[2]).parent.name == "checkpoints" or Path(e[2]).name == "output")
    ]
    assert len(commits) > 1 and commits[-1][2].name == "output"
    for at, part, place in commits:
        before = {Path(e[1]) for e in events[:at] if e[0] == "synced"}
        after = {Path(e[1]) for e in events[at:] if e[0] == "synced"}
        files = [p.name for p in (stage / "output").iterdir()]
        if place.name != "output":
            files = ["weights.safetensors", "optimizer.safetensors", "state.json"]
        assert {part, *(part / name for name in files)} <= before
        assert part.parent.parent in before or place.name == "output"  # the folder of checkpoints
        assert place.parent in after
    record = [i for i, e in enumerate(events) if e[-1] == str(stage / "stage.json")]
    assert record[-1] > commits[-1][0]  # done is said last
