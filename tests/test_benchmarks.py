"""The benchmarks: CI runs each of them, and the commands that pages name are what they take."""

import ast
import importlib
import math
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from measuring import check, chosen_from  # noqa: E402

FILES = {p.name: p.read_text(encoding="utf-8") for p in BENCHMARKS.glob("*.*")}
CI = re.sub(r" *\\\n *", " ", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
CI = "\n".join(line for line in CI.splitlines() if not line.startswith("#"))
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
QUOTED = re.compile(r"`python benchmarks/(\w+\.py)([^`]*)`")  # in a page
SHOWN = re.compile(r"^#? {4,5}python benchmarks/(\w+\.py)(.*?)(?:  .*)?$", re.M)  # at a file's head
CALLED = re.compile(r"^\$python \S*?\bbenchmarks/(\w+\.py)\"?(.*)$", re.M)  # in CI


def commands():
    """(where, script, words) of every command; words that may be left out are there too."""
    pages = [ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    for page in pages:
        for script, words in QUOTED.findall(page.read_text(encoding="utf-8")):
            yield str(page.relative_to(ROOT)), script, words
    for name, text in FILES.items():
        for script, words in SHOWN.findall(text):
            yield name, script, words
    for script, words in CALLED.findall(CI):
        yield ".ci/run", script, words


COMMANDS = list(dict.fromkeys(commands()))


def reached(name):
    """The files of the folder that one of them imports or names in a string."""
    for node in ast.walk(ast.parse(FILES[name])):
        if isinstance(node, ast.Import):
            yield from (f"{alias.name}.py" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"{node.module}.py"
        elif isinstance(node, ast.Constant):
            yield node.value


def test_ci_runs_every_benchmark():
    run = set(re.findall(r"\bbenchmarks/(\w+\.(?:py|yaml))", CI))
    assert run <= FILES.keys()
    for name in [n for n in run if n.endswith(".py")]:
        run |= FILES.keys() & set(reached(name))
    assert run == FILES.keys()


def test_commands_are_found():
    """Else the next test would hold for want of any."""
    where = {place for place, _, _ in COMMANDS}
    scripts = {name for name, text in FILES.items() if "def main(" in text}
    assert {".ci/run", "docs/performance.md", "gpu.yaml"} | scripts <= where
    assert len([c for c in COMMANDS if c[0] == ".ci/run"]) >= len(scripts)


@pytest.mark.parametrize(("where", "script", "words"), COMMANDS)
def test_a_command_is_what_the_script_takes(where, script, words, monkeypatch):
    assert script in FILES
    words = shlex.split(re.sub(r"[\[\]]", "", words))
    monkeypatch.setattr(sys, "argv", [script, *(w for w in words if w != "...")])
    module = importlib.import_module(script.removesuffix(".py"))
    module.arguments()  # argparse exits where it does not know a word


def test_every_table_of_the_page_has_its_command():
    sections = re.split(r"^#+ .*$", PERFORMANCE, flags=re.M)
    with_tables = [text for text in sections if "\n|---" in text]
    assert len(with_tables) > 4
    assert [text[:80] for text in with_tables if not QUOTED.search(text)] == []


@pytest.mark.parametrize("script", ["divergence", "opd_step", "divergence_gpu"])
def test_a_case_that_there_is_not_is_refused(script, monkeypatch, capsys):
    option = "--losses" if script == "divergence_gpu" else "--only"
    monkeypatch.setattr(sys, "argv", [script, option, "nonsense"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).arguments()
    assert stop.value.code == 2 and "nonsense is none of " in capsys.readouterr().err


def test_names_are_split_at_commas():
    assert chosen_from("abc")("c,a") == ["c", "a"]


WHOLE = {"seconds": 0.5, "peak": 0.0}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([WHOLE], "1 rows were measured instead of 2"),
        ([WHOLE, {"peak": 0.0}], "seconds is nan in"),
        ([WHOLE, WHOLE | {"seconds": 0.0}], "seconds is 0.0 in"),
        ([WHOLE, WHOLE | {"seconds": math.inf}], "seconds is inf in"),
        ([WHOLE, WHOLE | {"peak": math.nan}], "peak is nan in"),
        ([WHOLE, WHOLE | {"peak": -1}], "peak is -1 in"),
    ],
)
def test_measurements_that_are_incomplete_are_refused(rows, says):
    check([WHOLE, WHOLE], 2, ["seconds"], ["peak"])
    with pytest.raises(SystemExit, match=f"^{says}"):
        check(rows, 2, ["seconds"], ["peak"])
