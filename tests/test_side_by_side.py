"""benchmarks/methods.py: what it runs, what it reads from runs, and the page it writes."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from opdctl.catalogue import method, methods
from opdctl.plan import fingerprints
from opdctl.recipe import resolve
from opdctl.rundir import RunDir, read_json

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


@pytest.mark.slow
def test_record_goes_on_and_page_reads_it(tmp_path, monkeypatch):
    """A real run of two methods, then of a third: what is finished is taken over."""
    text = (ROOT / "benchmarks" / "methods.yaml").read_text()
    for long, short in (("steps: 450", "steps: 200"), ("steps: 80", "steps: 12")):
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
    shutil.rmtree(folder)
