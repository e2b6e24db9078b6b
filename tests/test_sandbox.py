"""Solutions against their tests: right ones pass, wrong ones and cheats do not, and what they do to
the machine stays within the limits. Each attack is run with and without namespaces."""

import os
import shutil
import socket
import tempfile
import time
import venv
from pathlib import Path

import pytest
from test_verifiers import one

from opdctl.errors import UsageError
from opdctl.rollout.verifiers._sandbox import Limits, Sandbox

LIMITS = Limits(seconds=1, wall=4.0, memory_mib=256, file_mib=1, disk_mib=4, processes=8)
DOUBLE = "def double(x):\n    return 2 * x\n"
TESTS = ["assert double(2) == 4", "assert double(-1) == -2"]


@pytest.fixture(scope="module", params=[True, False], ids=["namespaces", "limits_alone"])
def sandbox(request):
    python = "" if request.param else shutil.which("python3", path="/usr/bin") or ""
    try:
        built = Sandbox(LIMITS, namespaces=request.param, python=python)
    except UsageError as error:
        pytest.skip(f"no Python here that every user can read: {error}")
    if request.param and not built.isolated:
        pytest.skip("the kernel grants no namespaces here")
    assert built.isolated == request.param
    return built


CHEATS = {
    "wrong": "def double(x):\n    return x\n",
    "wrong on the second": "def double(x):\n    return 4\n",
    "no such function": "pass",
    "not Python": "def double(x) return",
    "sys.exit": "import sys\nsys.exit(0)",
    "sys.exit when asked": "import sys\ndef double(x):\n    sys.exit(0)\n",
    "os._exit": "import os\nos._exit(0)",
    "os._exit when asked": "import os\ndef double(x):\n    os._exit(0)\n",
    "raises SystemExit": "raise SystemExit(0)",
    "says that it passed": "print('passed')\nimport os\nos._exit(0)",
    "an exec that does nothing": (
        "import builtins, os\nbuiltins.exec = builtins.compile = lambda *a, **k: None\n"
        "os.write = lambda *a: None"
    ),
    "replaces what it is tested by": (
        "import builtins\nbuiltins.AssertionError = ValueError\n" + "def double(x): return None\n"
        "builtins.__dict__['__build_class__'] = None"
    ),
    "kills itself": "import os\nos.kill(os.getpid(), 9)",
    "closes everything": "import os\nos.closerange(0, 64)\n" + "def double(x): return 4",
    "never ends": "while True: pass",
    "sleeps": "import time\ntime.sleep(60)",
}


@pytest.mark.parametrize("name", CHEATS)
def test_only_what_passes_its_tests_passes(sandbox, name):
    start = time.monotonic()
    assert not sandbox.run(CHEATS[name], tests=TESTS).passed
    assert time.monotonic() - start < LIMITS.wall + 25


def test_a_right_solution_passes(sandbox):
    assert sandbox.run(DOUBLE, tests=TESTS).passed
    assert sandbox.run("import math, collections, json, re\n" + DOUBLE, tests=TESTS).passed
    assert sandbox.run(DOUBLE + "open('note', 'w').write('x')\n", tests=TESTS).passed
    assert sandbox.run("print(int(input()) * 2)", stdin="4\n").output == "8\n"
    noisy = "import os\nos.system = None\nprint('x' * 10)\n" + DOUBLE
    assert sandbox.run(noisy, tests=TESTS).passed


def test_a_builtin_that_a_solution_covers_is_not_what_tests_call(sandbox):
    cheat = "def double(x): return 0\ndef all(_): return True\n"
    assert not sandbox.run(cheat, tests=["assert all([double(2) == 4])"]).passed
    called_sum = "def sum(a, b): return a + b\n"  # as some tasks ask for
    assert sandbox.run(called_sum, tests=["assert sum(2, 3) == 5"]).passed
    assert not sandbox.run(called_sum, tests=["assert sum(2, 3) == 6"]).passed


READS = """
import glob, os, sys
found = "".join(sys.argv) + repr(dict(os.environ)) + repr(globals())
for path in ["/proc/self/cmdline", "/proc/self/environ", *glob.glob("*")]:
    try:
        found += open(path).read()
    except (OSError, UnicodeDecodeError):
        pass
for fd in range(3, 64):
    try:
        os.set_blocking(fd, False)
        found += repr(os.read(fd, 65536))
    except OSError:
        pass
    try:
        os.set_blocking(fd, True)  # or its own tests could not be read either
    except OSError:
        pass
secret = "31337" in found or "MY_" + "TOKEN" in found
def double(x):
    return 31337 if secret else 0
"""


def test_expected_answers_and_the_environment_are_not_there_to_read(sandbox, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "31337")
    assert sandbox.run(READS, tests=["assert double(2) != 31337"]).passed
    told = READS.replace("sys.argv)", 'sys.argv) + "31337"')
    assert sandbox.run(told, tests=["assert double(2) == 31337"]).passed  # it would have told


def test_output_and_files_and_memory_are_bounded(sandbox):
    flood = sandbox.run("while True: print('x' * 10000)")
    assert not flood.clean and len(flood.output) <= 1 << 20
    big = "open('big', 'wb').write(b'x' * (2 << 20))"
    assert not sandbox.run(big).clean
    assert sandbox.run(big.replace("2 << 20", "2 << 18")).clean
    bomb = "x = []\nwhile True: x.append(bytearray(1 << 24))"
    assert not sandbox.run(bomb).clean
    caught = "try:\n    bytearray(1 << 30)\nexcept MemoryError:\n    print('no')"
    assert sandbox.run(caught).output == "no\n"


def sleepers():
    """Processes here with the mark of these tests in their name or arguments."""
    processes = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/comm") as file:
                processes += [name] if file.read().startswith("opdctlmark") else []
        except OSError:
            pass
    return processes


MARK = "import ctypes, os, time\nctypes.CDLL(None).prctl(15, b'opdctlmark', 0, 0, 0)\n"
FORKS = MARK + "while True:\n    try: os.fork()\n    except OSError: pass\n"
CHILD = (
    MARK + "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(99)\n"
)
COUNT = "n = 0\ntry:\n    while n < 99:\n        n += 1\n        if not os.fork(): time.sleep(9)\n"
NAP = "import subprocess as s, sys\ns.run([sys.executable, '-c', 'import time; time.sleep(99)'])"


def test_no_process_is_left_behind(sandbox):
    assert not sandbox.run(FORKS).clean and not sleepers()
    count = COUNT + "except OSError:\n    print(n)\n"
    assert 1 <= int(sandbox.run(MARK + count).output) <= LIMITS.processes
    start = time.monotonic()
    passed = sandbox.run(CHILD + "    os._exit(0)\n" + DOUBLE, tests=TESTS).passed
    assert passed and not sleepers() and time.monotonic() - start < 60
    assert sandbox.run(NAP).late and not sleepers()


@pytest.fixture
def open_folder():
    """A folder that every user can read; ``tmp_path`` lies in one that only its owner can."""
    with tempfile.TemporaryDirectory(prefix="a b ", dir="/tmp") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_isolation_is_what_it_says(sandbox, open_folder):
    """Check what namespaces take away; limits alone leave the network, and say so."""
    (open_folder / "answers").write_text("31337")
    read = sandbox.run(f"print(open({str(open_folder / 'answers')!r}).read())").output
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = server.getsockname()
        call = f"import socket\nsocket.create_connection({place!r}, 5)\nprint('called')"
        called = sandbox.run(call).output
    assert (read, called) == (("", "") if sandbox.isolated else ("31337\n", "called\n"))
    assert sandbox.run("import os\nos.kill(os.getppid(), 9)\nos.kill(1, 9)").late is False
    assert not sandbox.run("open('/usr/opdctl-was-here', 'w')").clean
    assert not os.path.exists("/usr/opdctl-was-here")


@pytest.mark.parametrize("name", ["venv", "link"])
def test_python_may_lie_under_tmp_in_a_folder_with_a_blank(open_folder, name):
    """Where the sandbox has a folder of its own; and behind a link."""
    venv.create(open_folder / "venv", symlinks=True)
    (open_folder / "link").symlink_to(open_folder / "venv")
    sandbox = Sandbox(LIMITS, python=str(open_folder / name / "bin/python"))
    assert sandbox.run("import sys\nprint(sys.prefix)").output == f"{open_folder / name}\n"
    if not sandbox.isolated:
        pytest.skip("the kernel grants no namespaces here")
    assert sandbox.run("open('/tmp/note', 'w').write('x')").clean
    assert not sandbox.run(f"open({str(open_folder / 'note')!r}, 'w')").clean


def test_a_sandbox_without_room_for_python_is_refused():
    with pytest.raises(UsageError, match="the sandbox cannot run"):
        Sandbox(Limits(memory_mib=8))


def test_answers_are_not_run_without_isolation_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(Sandbox, "isolated", False, raising=False)
    monkeypatch.setattr(Sandbox, "__init__", lambda self, *args, **keys: None)
    ctx = type("C", (), {"check": lambda self: None})()
    data, _ = one(tmp_path, "code", None, tests=TESTS)
    with pytest.raises(UsageError, match="the kernel grants no namespaces here"):
        data.verifier(data.keys, ctx, "d")
    data, _ = one(tmp_path, {"code": {"isolation": False}}, None, tests=TESTS)
    assert data.verifier(data.keys, ctx, "d").sandbox.isolated is False


FENCED = "Like so:\n```python\n{}\n```\nDone."


@pytest.mark.parametrize(
    ("tests", "right", "wrong"),
    [
        (TESTS, DOUBLE, "def double(x): return 4"),
        ("\n".join(TESTS), DOUBLE, "double = abs"),
        ({"inputs": ["1\n", "3"], "outputs": ["2\n", "6"]}, "print(2 * int(input()))", "print(2)"),
        (
            '[{"input": "1", "output": "2"}]',
            "print(2 * int(input()), ' ')",
            "import sys; sys.exit(0)",
        ),
    ],
)
def test_code_verifier(tmp_path, tests, right, wrong):
    data, prompt = one(tmp_path, "code", None, tests=tests)
    ctx = type("C", (), {"check": lambda self: None})()
    verifier = data.verifier(data.keys, ctx, "d")
    answers = [right, FENCED.format(right), wrong, FENCED.format(wrong), "", "no code"]
    assert verifier.score([(prompt, a) for a in answers]) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ([], "no tests"),
        ("", "tests are"),
        ({"inputs": ["1"], "outputs": []}, "as many"),
        (7, "no tests"),
    ],
)
def test_rows_without_tests_are_refused(tmp_path, tests, message):
    with pytest.raises(UsageError, match=f"row 1: .*{message}"):
        one(tmp_path, "code", None, tests=tests)
