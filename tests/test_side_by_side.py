"""benchmarks/methods.py: what it runs, what it reads from runs, and the page it writes."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from opdctl.errors import UsageError
from opdctl.recipe.methods import method, methods
from opdctl.recipe.recipe import resolve
from opdctl.run.fingerprint import fingerprints
from opdctl.run.rundir import RunDir, read_json

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import methods as bench  # noqa: E402
import methods_page  # noqa: E402

RECORDED = sorted(p for p in (ROOT / "docs" / "methods").glob("*.json") if p.name[0] != "_")


def test_every_distilling_method_has_an_arm_of_the_same_budget():
    whole, refused = bench.tree(bench.distilling())
    stages = resolve(whole, "methods").stages
    assert set(bench.distilling()) == {n for n in methods() if method(n)["kind"] == "opd"}
    for name in bench.distilling():
        if name in refused:
            continue
        arm, first = stages[name], stages[methods_page.SAMPLED]
        for key in ("steps", "optim", "prompts", "sampling"):
            assert getattr(arm, key) == getattr(first, key), (name, key)
        assert arm.student == "stage:start" and arm.seed_group == first.seed_group
        assert arm.teachers == first.teachers and f"eval_{name}" in stages
        assert f"variance_{name}" in stages or f"variance_{name}" in refused
    assert {methods_page.SAMPLED, methods_page.FULL, methods_page.IMITATION} <= stages.keys()


def test_what_a_stage_refuses_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setitem(bench.TINY, "vopd", {"signals": {"no_such_signal": {}}})
    whole, refused = bench.tree(["vopd", "tip"])
    assert "no_such_signal" in refused["vopd"] and "variance_vopd" in refused
    assert "tip" in whole["stages"] and "eval_vopd" not in whole["stages"]


def rows_of(accuracies):
    return [
        {"accuracy": dict.fromkeys(bench.DOMAINS, a), "attempt": 1 + (i > 4), "cpu_seconds": i % 5}
        for i, a in enumerate(accuracies)
    ]


def test_arrival_is_the_first_window_that_recovered_enough():
    setting = {"start": dict.fromkeys(bench.DOMAINS, 0.5)}
    setting["teacher"] = dict.fromkeys(bench.DOMAINS, 0.9)
    assert bench.recovery(dict.fromkeys(bench.DOMAINS, 0.7), setting) == pytest.approx(0.5)
    rows = rows_of([0.5, 0.5, 0.87, 0.87, 0.87, 0.87, 0.87, 0.9])
    # .87 is .925 of the way: steps 3 to 7 are the first five
    # CPU seconds of the first attempt, to its last step, and of the second up to step 7
    assert bench.arrival(rows, setting) == (7, 4 + 1)
    assert bench.arrival(rows[:6], setting) is None


def content(values, **more):
    """A method's JSON, from recoveries by seed."""
    seeds = {
        str(s): {"recovery": v, "arrival": {"step": step, "cpu_seconds": step}, **more}
        for s, (v, step) in enumerate(values)
    }
    plain = {"tiny": {}, "not_in_variance": [], "variance_refused": ""}
    return {"seeds": seeds, **plain}


def gradient(variance):
    return {"gradient": {"variance": variance, "norm": 2.0, "batches": 4}}


@pytest.fixture
def made_up(tmp_path):
    """Five seeds of a few methods whose verdicts are known."""
    near = [0.01, -0.01, 0.02, -0.02, 0.0]
    start, teacher = (dict.fromkeys(bench.DOMAINS, v) for v in (0.4, 0.9))
    seeds = {str(s): {"start": start, "teacher": teacher} for s in range(5)}
    setting = {"versions": {"opdctl": "0"}, "steps": 60, "rollouts": 128, "seeds": seeds}
    found = {
        "thinking_machines": content([(0.80 + x, 40) for x in near], **gradient(12.0)),
        "deepseek_v4": content([(0.90 + x, 20) for x in near], **gradient(2.0)),
        "scope": content([(0.95 + x, 20) for x in near], **gradient(12.0)),  # better: shows
        "exopd": content([(0.60 + x, 20) for x in near]),  # worse: reversed
        "eopd": content([(0.80 - 5 * x, 20) for x in near]),  # neither
        "reopold": content([(0.8, None), *[(0.8, 10)] * 4]),  # never, on one seed
        "seqkd": content([(0.7, 1)] * 5),
    }
    for one in found["seqkd"]["seeds"].values():
        del one["arrival"]
    found["seqkd"]["seeds"]["3"] = {"failed": "the disk is full"}
    for name, what in {"_setting": setting, **found}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(what))
    return tmp_path


def lines(folder):
    """The page's tables: {(method, number of columns): its cells}."""
    rows = [line.strip("| ").split(" | ") for line in methods_page.page(folder).splitlines()]
    return {(r[0].strip("*"), len(r) > 6): r for r in rows if len(r) > 2}


def test_the_page_says_what_the_numbers_say(made_up):
    said = lines(made_up)
    assert said["scope", False][-1] == "**shows**"
    assert said["exopd", False][-1] == "**reversed**"
    assert said["eopd", False][-1] == "not shown"
    assert said["reopold", False][-2:] == ["10 (4/5) to 40 (5/5)", "not shown: not on every seed"]
    # noise: variance over |mean|^2 less variance / n: 2 / (4 - .5) and 12 / (4 - 3)
    assert said["deepseek_v4", False][-2:] == ["0.048 [0.048, 0.048]", "**shows**"]
    assert said["deepseek_v4", True][1] == "0.900 [0.880, 0.920]"
    assert said["deepseek_v4", True][2] == "0.100 [0.100, 0.100]"
    assert said["seqkd", True][4] == "not measured" and said["seqkd", True][1].startswith("0.700")
    assert "- `seqkd`, seed 3: the disk is full." in methods_page.page(made_up)


def test_one_seed_decides_nothing(made_up):
    for path in made_up.glob("*.json"):
        found = json.loads(path.read_text())
        found["seeds"] = {"0": found["seeds"]["0"]}
        path.write_text(json.dumps(found))
    said = lines(made_up)
    assert said["scope", False][-1] == said["exopd", False][-1] == "not shown"


def test_a_gradient_whose_mean_is_noise_has_no_number():
    assert methods_page.noise({"variance": 16.0, "norm": 2.0, "batches": 4}) is None


@pytest.mark.parametrize("path", RECORDED, ids=lambda p: p.stem)
def test_what_is_recorded_was_measured_on_the_method_as_it_is(path):
    """A method, its start or a teacher that changes has to be measured again."""
    found = json.loads(path.read_text())
    setting = json.loads((path.parent / "_setting.json").read_text())["seeds"]
    whole, _ = bench.tree([path.stem])
    for seed, one in found["seeds"].items():
        now = fingerprints(resolve({**whole, "seed": int(seed)}, "methods"))
        recorded = {**setting[seed]["fingerprints"], **one.get("fingerprints", {})}
        assert {s: now[s] for s in recorded} == recorded
    assert found["about"] == method(path.stem)["about"]


def test_the_page_is_what_the_records_generate():
    page = methods_page.page(ROOT / "docs" / "methods")
    assert page == (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


@pytest.fixture
def docs(tmp_path, monkeypatch):
    """A copy of what is recorded, and what one folder would have measured to give just that."""
    shutil.copytree(ROOT / "docs" / "methods", tmp_path / "docs" / "methods")
    monkeypatch.setattr(bench, "DOCS", tmp_path / "docs")
    setting = json.loads((ROOT / "docs" / "methods" / "_setting.json").read_text())
    each = {p.stem: json.loads(p.read_text())["seeds"] for p in RECORDED}
    monkeypatch.setattr(bench, "read", lambda folder: (setting, each))
    return tmp_path / "docs", setting, each


def typed(monkeypatch, *words):
    """Exit code of ``python benchmarks/methods.py`` with these words."""
    monkeypatch.setattr(sys, "argv", ["methods.py", *map(str, words)])
    return bench.main()


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_with_everything_is_the_page(docs, monkeypatch):
    before = files(docs[0])
    assert typed(monkeypatch, "page", "DIR") == 0
    written = docs[0] / "methods.md"
    assert files(docs[0]) == {**before, written: (ROOT / "docs" / "methods.md").read_bytes()}


def test_what_a_folder_lacks_stays_where_its_start_is_the_recorded_one(docs, monkeypatch):
    """And what it has is written: else a method could not be added."""
    folder, _, each = docs
    before, gkd = files(folder), json.loads(json.dumps(each["gkd"]))
    gkd["0"]["recovery"] = 0.5
    each.clear()
    each["gkd"] = gkd
    assert typed(monkeypatch, "page", "DIR") == 0
    after = files(folder)
    assert {p.name for p in before if before[p] != after[p]} == {"gkd.json"}
    assert read_json(folder / "methods" / "gkd.json")["seeds"] == gkd
    assert {p.name for p in after.keys() - before.keys()} == {"methods.md"}


def without_seeds(setting, each):
    for seeds in (setting["seeds"], *each.values()):
        del seeds["3"], seeds["4"]


def from_another_start(setting, each):
    del each["vopd"], each["tip"]
    setting["seeds"]["2"]["fingerprints"]["start"] = "0" * 16


def by_other_versions(setting, each):
    del each["vopd"], each["tip"]
    setting["versions"]["torch"] = "9"


def cut_short(setting, each):
    del each["vopd"]["3"]
    del each["tip"]["1"]


def beside_a_further_seed(setting, each):
    del each["vopd"], each["tip"]
    for seeds in (setting["seeds"], *each.values()):
        seeds["10"] = seeds["4"]


BOTH = "--methods tip,vopd"
ANEW = "to begin anew, remove the .json files of"


@pytest.mark.parametrize(
    ("spoil", "what", "do"),
    [
        (without_seeds, "DIR has no seed 3, 4, which the page has", "--seeds 3,4; " + ANEW),
        (from_another_start, "of DIR are not those of tip, vopd", f"{BOTH} --seeds 0,1,2,3,4; "),
        (by_other_versions, "of DIR are not those of tip, vopd", f"{BOTH} --seeds 0,1,2,3,4; "),
        (cut_short, "not measured on each of seeds 1, 3: tip, vopd", f"{BOTH} --seeds 1,3\n"),
        (beside_a_further_seed, "not measured on each of seeds 10: tip, vopd", "--seeds 10\n"),
    ],
)
def test_nothing_is_written_where_something_recorded_would_be_lost(
    spoil, what, do, docs, monkeypatch, capsys
):
    folder, setting, each = docs
    spoil(setting, each)
    before = files(folder)
    assert typed(monkeypatch, "page", "DIR") == 2
    assert files(folder) == before
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert what in said and "; python benchmarks/methods.py record DIR --" in said and do in said


def run_of(home, states):
    """A run directory that says so of its stages, and nothing else."""
    run = RunDir(home / "run-001")
    for stage, record in {"": {}, **states}.items():
        path = run.stage(stage) / "stage.json" if stage else run / "run.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record))
    return run


@pytest.mark.parametrize(
    ("place", "what"),
    [
        (None, "no seed-N/run-NNN in"),
        ("runs/seed-x", "no seed-N/run-NNN in"),
        ("seed-0", "no seed-N/run-NNN in"),
        ("runs/seed-1", "seed-1/run-001: base is not done; python benchmarks/methods.py record"),
    ],
)
def test_a_folder_that_has_nothing_to_read_is_refused(place, what, tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "docs" / "methods", tmp_path / "docs" / "methods")
    monkeypatch.setattr(bench, "DOCS", tmp_path / "docs")
    if place:
        run_of(tmp_path / place, {})
    before = files(tmp_path)
    assert typed(monkeypatch, "page", tmp_path / "runs") == 2
    assert files(tmp_path) == before
    said = capsys.readouterr().err
    assert what in said and str(tmp_path / "runs") in said and said.count("\n") == 1


def test_a_method_that_was_cut_is_not_measured_and_one_that_failed_is(tmp_path):
    recipe = resolve(bench.tree(["gkd"])[0], "methods")
    done, cut, failed = (
        {"status": "done"},
        {"status": "interrupted"},
        {"status": "failed", "error": "no"},
    )
    cases = (
        ({"gkd": cut}, None),
        ({"gkd": done, "eval_gkd": cut, "variance_gkd": done}, None),
        ({"gkd": done, "eval_gkd": done}, None),
        ({"gkd": failed}, {"failed": "no"}),
        ({"gkd": done, "eval_gkd": failed}, {"failed": "no"}),
    )
    for number, (states, expected) in enumerate(cases):
        run = run_of(tmp_path / str(number), states)
        assert bench.one(run, recipe, None, "gkd", {}) == expected, states


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--methods", "nonsense"), "no distilling method 'nonsense'; one of dagger, "),
        (("--methods", "gkd,vpod"), "no distilling method 'vpod'; did you mean 'vopd'?"),
        (("--methods", "grpo"), "no distilling method 'grpo'; "),
        (("--seeds", "abc"), "--seeds 'abc' names no seeds; --seeds 0..2"),
    ],
)
def test_record_refuses_what_it_cannot_run(words, what, tmp_path, monkeypatch, capsys):
    assert typed(monkeypatch, "record", tmp_path / "runs", *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and what in said and said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["record", "page"])
def test_help_says_what_each_argument_is(command, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        typed(monkeypatch, command, "--help")
    said = " ".join(capsys.readouterr().out.split())
    parts = {
        "record": ("DIR where the runs are", "--methods A,B methods of `opdctl ls", "SEEDS 0..4"),
        "page": ("DIR what was given to `record`",),
    }
    assert all(part in said for part in parts[command]), said


@pytest.mark.slow
def test_record_goes_on_and_page_reads_it(tmp_path, monkeypatch):
    """A real run of two methods, then of a third: what is finished is taken over."""
    text = (ROOT / "benchmarks" / "methods.yaml").read_text()
    shorter = (
        ("steps: 450", "steps: 200"),
        ("steps: 80", "steps: 12"),
        ("per_step: 160", "per_step: 48"),
    )
    for long, short in shorter:
        assert long in text
        text = text.replace(long, short)
    text = text.replace("limit: 600", "limit: 60")
    (tmp_path / "methods.yaml").write_text(text)
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setattr(bench, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(bench, "STEPS", 6)
    monkeypatch.setattr(bench, "BATCHES", 2)
    (tmp_path / "docs").mkdir()
    folder = tmp_path / "runs"
    assert bench.record(folder, ["thinking_machines", "seqkd"], [100]) == 0
    assert bench.record(folder, ["thinking_machines", "seqkd"], [100]) == 0  # nothing to do
    assert len(list(folder.glob("seed-100/run-*/run.json"))) == 1
    assert bench.record(folder, ["gkd"], [100]) == 0
    second = RunDir(folder / "seed-100" / "run-002")
    assert second.record("thinking_machines")["reused_from"].endswith("run-001")
    assert "reused_from" not in second.record("gkd")
    bench.collect(folder)
    sampled, off_policy = (
        read_json(tmp_path / "docs" / "methods" / f"{n}.json")["seeds"]["100"]
        for n in ("thinking_machines", "seqkd")
    )
    assert sampled["tokens"]["rollout"] > 0 == sampled["tokens"]["teacher_sampled"]
    assert off_policy["tokens"]["teacher_sampled"] > 0 == off_policy["tokens"]["rollout"]
    assert "arrival" in sampled and "arrival" not in off_policy
    assert sampled["cpu_seconds"] > 0 and sampled["gradient"]["variance"] > 0
    page = methods_page.page(tmp_path / "docs" / "methods")
    assert "**thinking_machines**" in page and "| gkd |" in page
    before = files(tmp_path / "docs")
    bench.collect(folder)  # the same again
    assert files(tmp_path / "docs") == before
    record = second.stage("eval_gkd") / "stage.json"
    record.write_text(json.dumps({**read_json(record), "status": "interrupted"}))
    with pytest.raises(UsageError, match=r"seeds 100: gkd"):
        bench.collect(folder)
    assert files(tmp_path / "docs") == before
    shutil.rmtree(folder)
