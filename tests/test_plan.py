"""The plan is kept: `run`, `resume` and `run --from` do as `plan` and `--dry-run` say."""

import dataclasses
import json
import shutil

import pytest
from test_provenance import flip

from opdctl.config.schema import key
from opdctl.config.settings import Teacher
from opdctl.recipe.recipe import load
from opdctl.run import provenance
from opdctl.run.fingerprint import revisions
from opdctl.run.launch import read_recipe
from opdctl.run.plan import plan
from opdctl.run.rundir import RunDir, write_json
from opdctl.run.status import status
from running import inside

RECIPE = """
name: files
data:
  sums: {{kind: jsonl, path: {rows}}}
  math: {{kind: reasoning_gym, task: gcd}}
stages:
  alone:
    kind: pretrain
    model: {{hidden: 32, intermediate: 64}}
    steps: 2
    prompts: {{domains: {{math: 1}}, per_step: 4}}
  first: &sums
    kind: sft
    student: {model}
    steps: 2
    prompts: {{domains: {{sums: 1}}, per_step: 4}}
  second: {{<<: *sums, student: stage:first}}
"""
CHANGES = ["rows", "model", "output"]


@pytest.fixture(scope="module")
def finished(on_disk, tmp_path_factory):
    """A folder: a recipe that reads a data file and a model folder, and its finished run."""
    folder = tmp_path_factory.mktemp("files")
    shutil.copytree(on_disk / "s", folder / "model")
    lines = (f'{{"prompt": "b{i:b}=", "answer": "{i % 9}"}}\n' for i in range(40))
    (folder / "rows.jsonl").write_text("".join(lines))
    text = RECIPE.format(rows=folder / "rows.jsonl", model=folder / "model")
    (folder / "recipe.yaml").write_text(text)
    done = inside("run", folder / "recipe.yaml", "--out", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """That run, copied, with the files that it read; they may be changed."""
    run = RunDir(tmp_path / "run")
    shutil.copytree(finished / "run", run.path, symlinks=True)
    before = {p: p.read_bytes() for p in (finished / "rows.jsonl", weights(finished / "model"))}
    yield run
    for path, content in before.items():
        path.write_bytes(content)


def weights(folder):
    return folder / "model.safetensors"


def change(finished, run, changed):
    """Change one file; the words that a reason has for it."""
    if changed == "rows":
        path = finished / "rows.jsonl"
        path.write_text(path.read_text().replace("b101=", "b1010101="))
        return "data.sums.path", str(path), "other data since"
    path = weights(run.output("first") if changed == "output" else finished / "model")
    flip(path)
    if changed == "output":
        return "its own output", "other weights since"
    return "student", str(finished / "model"), "other weights since"


def planned(*arguments):
    shown = inside("plan", *arguments, "--json")
    assert shown.returncode == 0, shown.stderr
    return {s["name"]: s for s in json.loads(shown.stdout)["stages"]}


def skipped(stages):
    return {name for name, entry in stages.items() if entry["action"] == "skip"}


@pytest.mark.parametrize("changed", CHANGES)
def test_from_does_what_plan_and_dry_run_say(finished, copy, tmp_path, changed):
    words, recipe = change(finished, copy, changed), finished / "recipe.yaml"
    stages = planned(recipe, "--from", copy.path)
    assert {n: s["action"] for n, s in stages.items()} == {
        "alone": "skip",
        "first": "rerun",
        "second": "rerun",
    }
    (reason,) = stages["first"]["reasons"]
    assert all(word in reason for word in words), reason
    assert "its input first is made again" in stages["second"]["reasons"]
    table = inside("plan", recipe, "--from", copy.path).stdout
    assert inside("run", recipe, "--from", copy.path, "--dry-run").stdout == table
    done = inside("run", recipe, "--from", copy.path, "--out", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    new = RunDir(tmp_path / "new")
    assert {s for s in stages if "reused_from" in new.record(s)} == skipped(stages)
    assert "have changed: first, second" in done.stderr
    assert skipped(planned(new.path)) == set(stages)  # and now all is done


@pytest.mark.parametrize("changed", CHANGES)
def test_resume_keeps_what_is_done_and_plan_says_what_has_changed(finished, copy, changed):
    words = change(finished, copy, changed)
    stages = planned(copy.path)
    assert skipped(stages) == set(stages)
    assert stages["alone"]["reasons"] == ["done"]
    done, reason, way = stages["first"]["reasons"]
    assert done == "done" and all(word in reason for word in words) and "--from" in way
    records = {s: copy.record(s) for s in stages}
    assert inside("resume", copy.path).returncode == 0
    assert {s: copy.record(s) for s in stages} == records


@pytest.mark.parametrize("changed", CHANGES)
def test_resume_refuses_what_plan_calls_blocked(finished, copy, changed):
    """A stage that is not done reads what another saw otherwise: nothing is started."""
    shutil.rmtree(copy.stage("second") / "output")
    (copy.stage("second") / "stage.json").unlink()
    assert planned(copy.path)["second"]["action"] == "run"
    if changed == "model":  # the second reads none: the first is to be made again, and reads it
        shutil.rmtree(copy.output("first"))
        record = copy.record("first") | {"status": "interrupted"}
        write_json(copy.stage("first") / "stage.json", record)
    change(finished, copy, changed)
    stages = planned(copy.path)
    name = "first" if changed == "model" else "second"
    assert stages[name]["action"] == "blocked"
    (reason,) = stages[name]["reasons"]
    refused = inside("resume", copy.path)
    assert refused.returncode == 2 and reason in refused.stderr and "put the old" in refused.stderr
    assert not copy.record("second")
    if changed == "model":
        assert stages["second"]["reasons"] == ["its input first is blocked"]


def test_what_is_made_again_in_place_is_removed_first(copy):
    record = copy.record("second")
    write_json(copy.stage("second") / "stage.json", {**record, "fingerprint": "of another"})
    entry = planned(copy.path)["second"]
    assert entry["action"] == "rerun" and "all that it made is removed first" in entry["reasons"]
    assert inside("resume", copy.path).returncode == 0
    again = copy.record("second")
    assert again["fingerprint"] == record["fingerprint"] and len(again["attempts"]) == 1
    assert again["attempts"] != record["attempts"]


def test_only_finished_stages_are_taken_over(finished, copy, tmp_path):
    write_json(
        copy.stage("second") / "stage.json", copy.record("second") | {"status": "interrupted"}
    )
    (copy.stage("second") / "checkpoints" / "step-000001").mkdir(parents=True)
    assert planned(copy.path)["second"]["action"] == "resume"
    recipe = finished / "recipe.yaml"
    entry = planned(recipe, "--from", copy.path)["second"]
    assert entry["action"] == "run" and "only finished stages are reused" in entry["reasons"][0]
    done = inside("run", recipe, "--from", copy.path, "--out", tmp_path / "new")
    assert done.returncode == 0 and RunDir(tmp_path / "new").record("second")["attempt"] == 1


def test_from_a_folder_that_is_no_run_is_refused_by_plan_too(finished, tmp_path):
    for arguments in (["plan"], ["run"], ["run", "--dry-run"]):
        refused = inside(*arguments, finished / "recipe.yaml", "--from", tmp_path)
        assert refused.returncode == 2 and "not a run directory" in refused.stderr


def test_status_and_a_new_run_hash_nothing(copy, monkeypatch):
    def refuse(*_):
        raise AssertionError("a file was hashed")

    monkeypatch.setattr(provenance, "_hash_files", refuse)
    assert status(copy)["state"] == "done"
    assert {p.action for p in plan(read_recipe(copy))} == {"run"}


def test_a_member_named_below_a_teacher_is_in_the_revisions():
    """A teacher stands in a dictionary; what it names counts as what a stage names itself."""

    @dataclasses.dataclass
    class Weighing(Teacher):
        weights: dict = key({}, "members of weights/", family="weights")
        later: dict = key(
            {}, "members of a key that changes nothing", role="operational", family="weights"
        )

    recipe = load("mimo")
    teacher = Weighing(model="stage:t_math", weights={"tip": None}, later={"pop": None})
    before = revisions(recipe, "mopd")
    recipe.stages["mopd"].teachers["math"] = teacher
    assert revisions(recipe, "mopd").keys() - before.keys() == {"weights/tip"}
