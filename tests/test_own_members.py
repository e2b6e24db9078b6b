"""Members of one's own: how they are found, refused, trusted, hashed and run."""

import json
import os
import subprocess
import sys

import pytest

from hostile import command
from opdctl.cli.new import new_member
from opdctl.config import registry
from opdctl.config.member_files import CONTRACTS, installed
from opdctl.errors import UsageError
from opdctl.recipe.own_members import trust_all
from opdctl.recipe.recipe import load
from opdctl.run.fingerprint import fingerprints
from opdctl.run.launch import read_recipe
from opdctl.run.plan import plan
from opdctl.run.rundir import RunDir
from running import DEMO, inside

RECIPE = """\
name: own
members: ./my_members
data:
  sums: {kind: addition, largest: 6, environment: {counter: {}}}
  table: {kind: jsonl, path: %(path)s, eval_share: 0.2, verifier: {ending: {}}}
stages:
  base: {kind: pretrain, steps: 3, prompts: {per_step: 4}, model: {hidden: 32, intermediate: 64}}
  t: {kind: sft, student: stage:base, steps: 2, prompts: {per_step: 4}, objectives: {powered: {}}}
  opd:
    kind: opd
    student: stage:base
    steps: 2
    prompts: {per_step: 4}
    sampling: {max_tokens: 4}
    teachers: {teacher: {model: stage:t, scored_by: floored}}
    signals: {approval: {limit: 2.0}}
    objectives: {policy_gradient: {weights: {doubt: {}}}}
  eval_base: {kind: evaluate, student: stage:base, prompts: {limit: 4}, sampling: {max_tokens: 4}}
  eval_opd: {kind: evaluate, student: stage:opd, prompts: {limit: 4}, sampling: {max_tokens: 4}}
claims:
  higher: {better: stage:opd, worse: stage:base, domain: sums}
"""
NAMES = {
    "data": "addition",
    "verifiers": "ending",
    "environments": "counter",
    "teachers": "floored",
    "signals": "approval",
    "objectives": "powered",
    "weights": "doubt",
    "claims": "higher",
}


@pytest.fixture(autouse=True)
def nothing_left():
    """The registry and the word of trust as they were."""
    yield
    registry.use_members(None)
    trust_all(False)


@pytest.fixture
def own(tmp_path):
    """A folder with a member of every family, and a recipe of them beside it."""
    for family, name in NAMES.items():
        new_member(family, name, tmp_path / "my_members")
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(30)]
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own.yaml").write_text(RECIPE % {"path": tmp_path / "table.jsonl"})
    return tmp_path


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def leave_canary(folder):
    """Let a member of the folder leave a file where it is imported; that file."""
    canary = folder.parent / "canary"
    line = "from dataclasses import dataclass"
    edit(folder / "signals" / "approval.py", line, f"{line}\n\nopen({str(canary)!r}, 'w').close()")
    return canary


def test_every_family_that_can_be_ones_own_has_a_skeleton():
    assert set(NAMES) == set(CONTRACTS) <= set(registry.FAMILIES)


def test_a_recipe_of_own_members_runs_and_resumes(own):
    done = inside("run", own / "own.yaml", "--out", own / "run", cwd="/")
    assert done.returncode == 0, done.stderr
    assert "one model beats the other" in done.stderr + done.stdout
    run = RunDir(own / "run")
    record = run.record("opd")
    assert record["revisions"]["signals/approval"] == 1
    assert record["revisions"]["teachers/floored"] == 1
    assert {"signals/approval.py", "teachers/floored.py"} <= set(record["members"])
    assert f"members: {own / 'my_members'}" in (run / "resolved.yaml").read_text()
    assert inside("resume", own / "run", cwd="/").returncode == 0

    edit(own / "my_members" / "signals" / "approval.py", "within a limit", "in a limit")
    planned = {p.name: p for p in plan(read_recipe(run, trusted=True), run)}
    assert planned["opd"].action == "rerun" and planned["base"].action == "skip"
    cleared = "all that it made is removed first"
    assert planned["opd"].reasons == ["members/signals/approval.py changed", cleared]
    assert planned["eval_opd"].reasons == ["its input opd changed", cleared]
    done = inside("resume", own / "run", cwd="/")
    assert done.returncode == 0 and "members/signals/approval.py changed" in done.stderr
    planned = plan(read_recipe(run, trusted=True), run)
    assert {p.action for p in planned} == {"skip"}


def test_a_file_that_a_member_imports_belongs_to_it(own):
    signal = own / "my_members" / "signals" / "approval.py"
    edit(signal, "from opdctl.config.schema import key\n",
         "from opdctl.config.schema import key\n\nfrom .._shared import LIMIT\n")  # fmt: skip
    edit(signal, "key(5.0,", "key(LIMIT,")
    (own / "my_members" / "_shared.py").write_text("LIMIT = 4.0\n")
    before = load(str(own / "own.yaml"), trusted=True)
    assert registry.member("signals", "approval").Config().limit == 4.0
    old = fingerprints(before)
    (own / "my_members" / "_shared.py").write_text("LIMIT = 3.0\n")  # same size, same second
    after = load(str(own / "own.yaml"), trusted=True)
    assert registry.member("signals", "approval").Config().limit == 3.0
    new = fingerprints(after)
    assert {s for s in old if old[s] != new[s]} == {"opd", "eval_opd"}
    (own / "my_members" / "claims" / "_unused.py").write_text("")
    assert fingerprints(load(str(own / "own.yaml"), trusted=True)) == new


@pytest.mark.parametrize("line", ("from shared_limits import LIMIT", "import shared_limits"))
def test_so_does_one_that_it_imports_by_its_whole_name(own, line, monkeypatch):
    shared = own / "my_members" / "shared_limits.py"
    shared.write_text("LIMIT = 4.0\n")
    monkeypatch.syspath_prepend(str(own / "my_members"))
    signal = own / "my_members" / "signals" / "approval.py"
    edit(signal, "from opdctl.config.schema import key\n",
         f"from opdctl.config.schema import key\n\n{line}\n")  # fmt: skip
    old = fingerprints(load(str(own / "own.yaml"), trusted=True))
    shared.write_text("LIMIT = 3.0\n")
    new = fingerprints(load(str(own / "own.yaml"), trusted=True))
    assert {s for s in old if old[s] != new[s]} == {"opd", "eval_opd"}
    sys.modules.pop("shared_limits", None)


def test_a_dry_run_imports_members_where_it_is_told_to(own):
    canary = leave_canary(own / "my_members")
    code, out, err = command("run", own / "own.yaml", "--dry-run", "--trust-members")
    assert code == 0, err
    assert canary.exists() and "eval_opd" in out


def test_a_folder_that_nothing_uses_changes_no_fingerprint(own):
    plain = fingerprints(load(str(DEMO)))
    assert plain == fingerprints(
        load(str(DEMO), overrides=(f"members={own}/my_members",), trusted=True)
    )


@pytest.mark.parametrize("what", ("plan", "validate", "diagnose", "run --dry-run"))
def test_code_of_a_recipe_is_not_imported_by_what_only_reads(own, what):
    canary = leave_canary(own / "my_members")
    name, *flags = what.split()
    code, _, err = command(name, own / "own.yaml", *flags)
    assert code == 2 and not canary.exists()
    assert "--trust-members" in err and str(own / "my_members") in err and "own.yaml:2" in err
    if not flags:
        code, _, err = command(name, own / "own.yaml", "--trust-members")
        assert canary.exists()
        assert code == 0 or name == "diagnose", err  # which finds no model to measure


def test_a_run_directory_of_a_stranger_is_not_trusted_either(own):
    assert inside("run", own / "own.yaml", "--only", "base", "--out", own / "run").returncode == 0
    moved = own / "elsewhere"
    (own / "my_members").rename(moved)
    edit(own / "run" / "resolved.yaml", f"{own}/my_members", str(moved))
    canary = leave_canary(moved)
    for words in (("status",), ("plan",), ("claims",), ("report",), ("validate",)):
        code, _, err = command(*words, own / "run")
        assert code == 2 and "--trust-members" in err, words
    model = own / "run" / "stages" / "base" / "output"
    code, _, err = command("stage", "opd", "--student", model, "--teacher", model, "--dry-run")
    assert code == 2 and not canary.exists()  # it would take the data of that run
    code, _, err = command("status", own / "run", "--trust-members")
    assert code == 0 and canary.exists(), err


def test_the_environment_says_that_recipes_are_ones_own(own, monkeypatch):
    assert command("plan", own / "own.yaml")[0] == 2
    monkeypatch.setenv("OPDCTL_TRUST_MEMBERS", "1")
    assert command("plan", own / "own.yaml")[0] == 0


def test_the_working_directory_is_no_place_of_members(own, monkeypatch):
    monkeypatch.chdir(own / "my_members")
    with pytest.raises(UsageError, match="no member 'approval'"):
        registry.member("signals", "approval")
    text = (own / "own.yaml").read_text()
    (own / "deep").mkdir()
    (own / "deep" / "own.yaml").write_text(text)
    with pytest.raises(UsageError, match=f"no folder {own}/deep/my_members"):
        load(str(own / "deep" / "own.yaml"), trusted=True)  # beside its file, not from here
    load(str(own / "deep" / "own.yaml"), overrides=("members=.",), trusted=True)


FIRST = "from dataclasses import dataclass"
BROKEN = {
    "raises": (FIRST, "import math; math.sqrt(-1)", ":9: ValueError: math domain error"),
    "ends": (FIRST, "raise SystemExit('bye')", ":9: SystemExit: bye"),
    "syntax": ("class Approval(", "class Approval((", ":16: SyntaxError"),
    "class": ("class Approval", "class Approved", ":1: no class Approval"),
    "config": (
        "class Config(SignalConfig)",
        "class Keys(SignalConfig)",
        ":16: Approval has no nest",
    ),
    "keys": ("Config(SignalConfig)", "Config", ":16: Approval.Config has no coef"),
    "docstring": ('"""log T - log S', '0\n    """log T - log S', ":16: Approval has no docstring"),
    "revision": ("    revision = 1\n", "", ":16: Approval has no revision"),
    "base": ("Approval(Signal)", "Approval", ":16: Approval does not inherit from Signal"),
    "method": ("def credit", "def loss", ":16: Approval has no credit"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_error_in_a_member_names_its_file_and_line(own, case):
    signal = own / "my_members" / "signals" / "approval.py"
    text = signal.read_text()
    first = text.index("class Approval")
    assert text[:first].count("\n") + 1 == 16
    old, new, message = BROKEN[case]
    edit(signal, old, new)
    code, _, err = command("validate", own / "own.yaml", "--trust-members")
    assert code == 2 and f"{signal}{message}" in err, err
    assert "stages.opd.signals.approval" in err and "Traceback" not in err


def test_what_cannot_be_a_member_is_refused_by_name(own):
    folder = own / "my_members"

    def refused(text):
        with pytest.raises(UsageError, match=text):
            registry.use_members(folder)

    (folder / "signals" / "reverse_kl.py").write_text("")
    refused(f"{folder}/signals/reverse_kl.py: opdctl has a member 'reverse_kl' in signals")
    (folder / "signals" / "reverse_kl.py").rename(folder / "signals" / "my-own.py")
    refused("my-own.py: not the name of a member")
    (folder / "signals" / "my-own.py").unlink()
    (folder / "signals").rename(folder / "signal")
    refused(f"{folder}/signal is named after no family")
    with pytest.raises(UsageError, match="no member in"):
        registry.use_members(own / "my_members" / "tests")
    with pytest.raises(UsageError, match="no folder"):
        registry.use_members(own / "nowhere")


def test_ls_and_show_name_the_file(own):
    folder = own / "my_members"
    code, out, _ = command("ls", "signals", "--members", folder, "--json")
    rows = {row["name"]: row["about"] for row in json.loads(out)}
    assert code == 0 and rows["approval"].endswith(f"({folder}/signals/approval.py)")
    code, out, _ = command("show", "approval", "--members", folder)
    assert code == 0 and f"{folder}/signals/approval.py" in out and "limit" in out
    assert command("show", "approval")[0] == 2  # without the folder there is none


@pytest.fixture
def package(own, monkeypatch):
    """The same members in an installed package, named by an entry point."""
    site = own / "site"
    (site / "lab").mkdir(parents=True)
    (own / "my_members").rename(site / "lab" / "members")
    (site / "lab" / "__init__.py").write_text("")
    info = site / "lab-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[opdctl.members]\nlab = lab.members\n")
    edit(own / "own.yaml", "members: ./my_members\n", "")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *sys.path]))
    installed.cache_clear()
    yield site
    installed.cache_clear()
    for name in [n for n in sys.modules if n.split(".")[0] == "lab"]:
        del sys.modules[name]


def test_members_of_a_package_need_no_key_and_no_flag(own, package):
    words = [sys.executable, "-m", "opdctl"]
    options = {"cwd": own, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([*words, "plan", "own.yaml"], **options)
    assert done.returncode == 0, done.stderr
    more = ["--only", "opd", "--out", "run"]
    done = subprocess.run([*words, "run", "own.yaml", *more], **options)
    assert done.returncode == 0, done.stderr
    record = RunDir(own / "run").record("opd")
    assert {"signals/approval.py", "teachers/floored.py"} <= set(record["members"])
    edit(package / "lab" / "members" / "signals" / "approval.py", "within a limit", "in a limit")
    done = subprocess.run([*words, "plan", "run"], **options)
    assert "members/signals/approval.py changed" in done.stdout
    _, out, _ = command("ls", "signals", "--json")
    assert "approval" in {row["name"] for row in json.loads(out)}


def test_one_name_in_two_places_is_refused_with_both(own, package):
    new_member("signal", "approval", own / "my_members")
    with pytest.raises(UsageError, match="two members 'approval' in signals") as caught:
        load(str(own / "own.yaml"), overrides=(f"members={own}/my_members",), trusted=True)
    for folder in (own / "my_members", package / "lab" / "members"):
        assert str(folder / "signals" / "approval.py") in str(caught.value)


def test_an_entry_point_that_names_no_package(own, package):
    (package / "lab-1.0.dist-info" / "entry_points.txt").write_text(
        "[opdctl.members]\nlab = lab.nothing\n"
    )
    installed.cache_clear()
    fingerprints(load(str(DEMO)))  # it is not looked at where nothing of one's own is named
    with pytest.raises(UsageError, match=r"lab = lab\.nothing: no such package"):
        registry.members("signals")


def test_new_writes_members_whose_tests_pass(tmp_path):
    folder = tmp_path / "mine"
    for family, name in NAMES.items():
        words = ("new", family.removesuffix("s"), name, "--in", folder)
        code, out, err = command(*words)
        assert code == 0 and "skeleton" not in out, err
        assert out.splitlines()[0] == str(folder / family / f"{name}.py")
        assert command(*words)[0] == 2  # nothing is overwritten
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", folder]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and f"{len(NAMES)} passed" in done.stdout, done.stdout


def test_new_refuses_other_families_and_names():
    for words, message in {
        ("controller", "mine"): "members of controllers are opdctl's own",
        ("gadget", "mine"): "no family 'gadget'",
        ("signal", "outcome"): "opdctl has a member 'outcome' in signals",
        ("signal", "Mine"): "'Mine' is not the name of a member",
        ("signal", "../mine"): "is not the name of a member",
    }.items():
        code, _, err = command("new", *words)
        assert code == 2 and message in err
