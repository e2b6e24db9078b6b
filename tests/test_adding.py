"""docs/adding-a-method.md, carried out on a copy of the package: what it says to write works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from one_step import write

from conftest import make_model

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "adding-a-method.md").read_text()
BLOCK = re.compile(r"^`(\S+)`\n\n```\w+\n(.*?)^```$", re.M | re.S)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository with the page's files in it, models s and t beside."""
    folder = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__")
    for part in ("opdctl", "recipes", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name, text in BLOCK.findall(PAGE):
        with (folder / name).open("a") as file:  # new files, and the end of one that is there
            file.write(text)
    write(folder, {"s": make_model(0), "t": make_model(1)})
    return folder


def command(copy, *arguments):
    """A module's main on the copy; its exit code and output."""
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=copy, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_the_page_names_every_file_it_needs():
    names = [name for name, _ in BLOCK.findall(PAGE)]
    assert names == [
        "mine.yaml",
        "opdctl/loss/weights/trust.py",
        "opdctl/methods/trust.yaml",
        "tests/test_method_values.py",
    ]


@pytest.mark.parametrize("method", ("./mine.yaml", "trust"))
def test_a_method_of_the_page_runs(method, copy):
    data = ["data.sums.kind=jsonl", "data.sums.path=sums.jsonl", "data.sums.eval_share=0"]
    keys = ["steps=2", "prompts.per_step=2", "sampling.max_tokens=4"]
    code, said = command(
        copy, "opdctl", "stage", "opd", "--student", "s", "--teacher", "sums=t",
        "--method", method, *data, *keys, "--out", f"run-{Path(method).stem}",
    )  # fmt: skip
    assert code == 0, said
    code, said = command(copy, "opdctl", "ls", "weights")
    assert "min(q / p, 1) of the sampled token, to a power." in said


def test_the_test_of_the_page_passes_and_fails_where_the_formula_is_broken(copy):
    tests = ("pytest", "-q", "-n", "0", "tests/test_method_values.py", "-k", "trust")
    code, said = command(copy, *tests)
    assert code == 0 and "1 passed" in said, said
    member = copy / "opdctl" / "loss" / "weights" / "trust.py"
    text = member.read_text()
    try:
        member.write_text(text.replace("clamp(max=0)", "clamp(max=1)"))
        code, said = command(copy, *tests)
    finally:
        member.write_text(text)
    assert code == 1 and "1 failed" in said, said
