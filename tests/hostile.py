"""What a stranger is given: the command in this process, a place of its own, bounds."""

import contextlib
import functools
import io
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

import pytest
import typer

from opdctl.cli import app as cli

SECRET = "xyzzy-of-the-environment"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An empty working directory, and a secret in the environment."""
    folder, before = tmp_path_factory.mktemp("hostile"), os.getcwd()
    os.chdir(folder)
    os.environ["OPDCTL_SECRET"] = SECRET
    build = typer.main.get_command
    typer.main.get_command = functools.cache(build)  # the same commands, hundreds of times
    yield folder
    typer.main.get_command = build
    del os.environ["OPDCTL_SECRET"]
    os.chdir(before)


def command(*arguments):
    """The command in this process: exit code, stdout, stderr. A traceback is an error here."""
    out, before, code = io.StringIO(), sys.argv, 0
    sys.argv = ["opdctl", *map(str, arguments)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as err:  # what it starts may write there
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            sys.argv = before
        err.seek(0)
        return code, out.getvalue(), err.read()


def in_child(action, seconds=20, mib=1024):
    """Run in a fork with bounds on its time and memory. Returns what ``action`` gives as text."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.close(ours)
        here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (here + mib * 2**20,) * 2)
        spent = int(sum(os.times()[:2])) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds,) * 2)
        with os.fdopen(theirs, "w") as file:
            try:
                file.write(str(action()))
            except BaseException as error:
                file.write(f"{type(error).__name__}: {error}")
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    return text if not status else f"died of {status}"


ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(40)]


def jsonl(rows=ROWS, start=""):
    return start + "".join(json.dumps(r) + "\n" for r in rows)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with a whole model and a whole file of prompts."""
    from conftest import make_model
    from opdctl.models import model as models

    folder = tmp_path_factory.mktemp("good")
    models.save(make_model(), folder / "model")
    (folder / "data.jsonl").write_text(jsonl())
    return folder
