"""docs/adding-a-method.md, carried out: what it says to write works, in all three places."""

import re
import shutil
import tomllib
from pathlib import Path

import pytest
from one_step import write

from conftest import make_model
from opdctl.config import registry
from opdctl.config.member_files import installed
from opdctl.recipe.own_members import trust_all
from running import elsewhere, inside

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "adding-a-method.md").read_text()
BLOCKS = dict(re.findall(r"^`(\S+)`\n\n```\w+\n(.*?)^```$", PAGE, re.M | re.S))
MEMBER = "my_members/weights/trust.py"
COMPOSED = ("signals={}", "objectives={divergence: {weights: {trust: {}}}}")
LINE = "min(q / p, 1) of the sampled token, to a power."


def lay(folder, *names):
    """Write files of the page below a folder: new ones, and the end of one that is there."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("a") as file:
            file.write(BLOCKS[name])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with the models s and t and prompts in sums.jsonl."""
    folder = tmp_path_factory.mktemp("models")
    write(folder, {"s": make_model(0), "t": make_model(1)})
    return folder


@pytest.fixture
def place(models, tmp_path):
    """An empty folder of a newcomer, with the models and prompts linked into it."""
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture(scope="module")
def fork(models, tmp_path_factory):
    """A copy of the repository with the page's member and method in it."""
    folder = tmp_path_factory.mktemp("fork")
    ignore = shutil.ignore_patterns("__pycache__")
    for part in ("opdctl", "recipes", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    lay(folder, MEMBER, "opdctl/methods/trust.yaml", "tests/test_method_values.py")
    (folder / MEMBER).rename(folder / "opdctl/loss/weights/trust.py")
    for path in models.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """Nothing is trusted before a test, and nothing of its members is left after it."""
    monkeypatch.delenv("OPDCTL_TRUST_MEMBERS", raising=False)
    yield
    registry.use_members(None)
    trust_all(False)
    installed.cache_clear()


def command(folder, *words):
    """The command, run in a folder; its exit code and output."""
    done = inside(*words, cwd=folder)
    return done.returncode, done.stdout + done.stderr


# the command with the copy's opdctl, whose stages are forked from it: no server imports torch anew
FORKING = """
import multiprocessing
get = multiprocessing.get_context
multiprocessing.get_context = lambda kind: get("fork")
from opdctl.cli.app import main
main()
"""


def in_the_fork(fork, *words):
    done = elsewhere(fork, FORKING, "opdctl", *words, paths=(fork,))
    return done.returncode, done.stdout


def stage(folder, out, *words, run=command):
    """``opdctl stage opd`` on the models, of two steps."""
    data = ["data.sums.kind=jsonl", "data.sums.path=sums.jsonl", "data.sums.eval_share=0"]
    keys = ["steps=2", "prompts.per_step=2", "sampling.max_tokens=4"]
    teach = ["--student", "s", "--teacher", "sums=t"]
    return run(folder, "stage", "opd", *teach, *data, *keys, *words, "--out", out)


def test_the_page_names_every_file_it_needs():
    assert list(BLOCKS) == [
        "mine.yaml",
        MEMBER,
        "own.yaml",
        "lab/pyproject.toml",
        "opdctl/methods/trust.yaml",
        "tests/test_method_values.py",
    ]


def test_a_method_of_known_members_is_a_file_anywhere(place):
    lay(place, "mine.yaml")
    code, output = stage(place, "run", "--method", "./mine.yaml")
    assert code == 0, output


def test_a_new_weight_is_one_file(place):
    before = {p.name for p in place.iterdir()}
    lay(place, MEMBER)
    code, output = stage(place, "run", "members=./my_members", *COMPOSED)
    assert code == 0, output
    new = [p for p in place.rglob("*") if p.is_file() and "run" not in p.parts]
    new = [str(p.relative_to(place)) for p in new if p.relative_to(place).parts[0] not in before]
    assert new == [MEMBER]


def test_a_recipe_brings_its_folder_and_plan_asks_first(place):
    lay(place, MEMBER, "own.yaml")
    code, output = command(place, "plan", "own.yaml")
    assert code == 2 and "--trust-members" in output
    code, output = command(place, "plan", "own.yaml", "--trust-members")
    assert code == 0, output
    code, output = command(place, "run", "own.yaml", "--out", "run")
    assert code == 0, output
    (place / MEMBER).write_text(BLOCKS[MEMBER].replace("clamp(max=0)", "clamp(max=1)"))
    code, output = command(place, "plan", "run", "--trust-members")
    assert "members/weights/trust.py changed" in output
    for words in (("ls", "weights"), ("show", "trust")):
        code, output = command(place, *words, "--members", "./my_members")
        assert code == 0 and LINE in output, output


def test_a_package_brings_its_members_where_it_is_installed(place, monkeypatch):
    lay(place, MEMBER, "lab/pyproject.toml")
    project = tomllib.loads((place / "lab" / "pyproject.toml").read_text())["project"]
    (group, points), = project["entry-points"].items()  # fmt: skip
    site = place / "site"  # what an installer makes of it
    (site / "lab").mkdir(parents=True)
    (place / "my_members").rename(site / "lab" / "members")
    info = site / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab\nVersion: 1.0\n")
    lines = [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(site))
    installed.cache_clear()
    code, output = stage(place, "run", *COMPOSED)
    assert code == 0, output
    code, output = command(place, "ls", "weights")
    assert LINE in output


def test_a_member_of_the_package_is_the_same_file(fork):
    code, output = stage(fork, "run", "--method", "trust", run=in_the_fork)
    assert code == 0, output
    code, output = in_the_fork(fork, "ls", "weights")
    assert LINE in output


def test_the_test_of_the_page_passes_and_fails_where_the_formula_is_broken(fork):
    program = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    words = ("pytest", "-q", "-p", "no:xdist", "tests/test_method_values.py", "-k", "trust")

    def tested():
        done = elsewhere(fork, program, *words, paths=(fork, fork / "tests"))
        return done.returncode, done.stdout

    code, output = tested()
    assert code == 0 and "1 passed" in output, output
    member = fork / "opdctl" / "loss" / "weights" / "trust.py"
    text = member.read_text()
    try:
        member.write_text(text.replace("clamp(max=0)", "clamp(max=1)"))
        code, output = tested()
    finally:
        member.write_text(text)
    assert code == 1 and "1 failed" in output, output
