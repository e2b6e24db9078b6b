"""A run goes on without its terminal; a command knows when its streams are closed."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opdctl.run.rundir import RunDir

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def python(program, *arguments, **how):
    """Run a short program that imports no torch."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=60, **how)


def test_what_cannot_be_printed_does_not_end_a_run(tmp_path):
    program = """
import os, sys
from opdctl.process.streams import outlive_the_terminal
full = os.open("/dev/full", os.O_WRONLY)
os.dup2(full, 1); os.dup2(full, 2)
outlive_the_terminal()
for stream in (sys.stdout, sys.stderr):
    for _ in range(3):
        print("text " * 5000, file=stream, flush=True)
open(sys.argv[1], "w").write("went on")
"""
    done = python(program, str(tmp_path / "mark"))
    assert done.returncode == 0
    assert (tmp_path / "mark").read_text() == "went on"


def test_what_can_be_printed_is(tmp_path):
    program = """
import sys
from opdctl.process.streams import outlive_the_terminal
print("before")
outlive_the_terminal()
print("after \\ud800")
print("error", file=sys.stderr)
"""
    done = python(program)
    assert done.stdout == "before\nafter \\ud800\n"
    assert done.stderr == "error\n"


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    program = """
import os, subprocess, sys
from opdctl.process.streams import open_closed_streams
for number in (0, 1, 2):
    os.close(number)
open_closed_streams()
file = open(sys.argv[1], "w")
print("to nobody"); print("to nobody", file=sys.stderr)
assert sys.stdin.read() == ""
child = "import os; [os.fstat(number) for number in (0, 1, 2)]"
file.write(str((file.fileno() > 2, subprocess.call([sys.executable, "-c", child]))))
"""
    assert python(program, str(tmp_path / "file")).returncode == 0
    assert (tmp_path / "file").read_text() == "(True, 0)"


@pytest.mark.parametrize("fails", [False, True])
def test_a_detached_process_leads_a_session_of_its_own(tmp_path, fails):
    log = tmp_path / "logs" / "detached.log"
    program = f"""
import os, sys, time
from pathlib import Path
from opdctl.process.detach import detach
begun = detach(Path(sys.argv[1]), "look there")
print("child", os.getsid(0) == os.getpid(), flush=True)
if {fails}:
    sys.exit(4)
begun()
time.sleep(0.3)
print("end", flush=True)
"""
    done = python(program, str(log))
    if fails:
        assert (done.returncode, done.stderr) == (4, "child True\n")
        return
    assert (done.returncode, done.stderr) == (0, "look there\n")
    deadline = time.monotonic() + 20
    while "end" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert log.read_text() == "child True\nend\n"


def test_a_terminal_that_closes_stops_a_run_with_a_checkpoint(tmp_path):
    run = RunDir(tmp_path / "run")
    child, terminal = pty.fork()
    if not child:
        command = ["-m", "opdctl", "run", str(ROOT / "tests" / "demo.yaml"), "--only", "base"]
        command += ["stages.base.steps=100000", "runtime.checkpoint_every=1000"]
        os.execve(sys.executable, [sys.executable, *command, "--out", str(run.path)], ENV)
    deadline = time.monotonic() + 100
    while not (run.stage("base") / "metrics.jsonl").exists() and time.monotonic() < deadline:
        os.read(terminal, 65536)
    os.close(terminal)  # the kernel sends SIGHUP to all of the session's foreground
    _, status = os.waitpid(child, 0)
    record = run.record("base")
    assert (os.waitstatus_to_exitcode(status), record["status"]) == (75, "interrupted")
    assert list((run.stage("base") / "checkpoints").iterdir())
    assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
