"""What is told of a run: one value and one rounding everywhere, its state at the end, its time."""

import json
import time

import pytest

from hostile import command
from opdctl.cli import console
from opdctl.cli.report import write
from opdctl.errors import UsageError
from opdctl.evidence.accuracy import accuracies
from opdctl.evidence.judge import judge, scores
from opdctl.evidence.verdict import format_estimate
from opdctl.recipe.recipe import resolve
from opdctl.run.launch import new_run
from opdctl.run.rundir import lock, write_json
from opdctl.run.status import status
from opdctl.train.evaluation import record

RIGHT = {"math": [4] * 3 + [0] * 9, "sums": [0] * 12}
TEXT = {"math": "0.250 [0.089, 0.532]", "sums": "0.000 [0.000, 0.243]"}  # Wilson, 12 prompts


def put(run, stage, **content):
    """Write the record of a stage, made from what the recipe says."""
    content["fingerprint"] = run.manifest()["fingerprints"][stage]
    write_json(run.stage(stage) / "stage.json", content)


@pytest.fixture
def run(tmp_path):
    """A run with one model, evaluated at temperature 1, colder, and again with other keys."""
    table = {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl"), "verifier": {"exact": {}}}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1", "answer": "1"}) + "\n")
    evaluation = {"kind": "evaluate", "student": "stage:base"}
    stages = {
        "base": {"kind": "pretrain", "steps": 1},
        "eval_base": evaluation,
        "eval_cold": evaluation | {"sampling": {"temperature": 0.5}},
        "eval_more": evaluation | {"sampling": {"max_tokens": 7}},
    }
    claims = {"M5": {"student": "stage:base", "start": "stage:base", "domains": {"math": True}}}
    tree = {"name": "told", "data": {"math": table, "sums": table}, "stages": stages}
    recipe = resolve(tree | {"claims": claims}, "told")
    run = new_run(recipe, "", tmp_path / "run")
    for stage in stages:
        put(run, stage, status="done")
    for stage in ("eval_base", "eval_cold", "eval_more"):
        rows = [record("base", d, 4, r, [3] * 48, [4] * 12) for d, r in RIGHT.items()]
        if stage == "eval_base":
            rows[0]["ci95"] = [-0.01, 0.51]  # of an earlier version
        write_json(run.stage(stage) / "results.json", rows)
    return run


def text_of(table):
    with console.out.capture() as printed:
        console.show(table)
    return printed.get()


def test_one_interval_is_the_same_on_the_terminal_in_the_report_and_in_json(run, monkeypatch):
    told = accuracies(run)
    assert list(told) == ["base", "base at 0.5", "base (eval_more)"]
    page = write(run).read_text()
    for width in (60, 160):
        monkeypatch.setattr(console.out, "width", width)
        seen = text_of(console.scores_table(told))
        for domain, text in TEXT.items():
            assert seen.count(text) == page.count(text) == 3
            value, *ends = told["base"][domain]
            assert format_estimate(value, ends) == text
            assert scores(run)["base"][domain] == (value, *ends)
            row = next(r for r in rows_of(run, "eval_cold") if r["domain"] == domain)
            assert format_estimate(row["accuracy"], row["ci95"]) == text


def rows_of(run, stage):
    return json.loads((run.stage(stage) / "results.json").read_text())


def test_damaged_results_are_named(run):
    path = run.stage("eval_base") / "results.json"
    for rows in ([], [{"model": "base", "domain": "math", "samples": 4}], [3]):
        write_json(path, rows)
        with pytest.raises(UsageError, match=r"eval_base/results\.json is damaged"):
            accuracies(run)


def test_a_claim_reads_alike_everywhere(run, monkeypatch):
    (claim,) = judge(run)
    text = "change of math " + format_estimate(0.0, claim["interval"]["change of math"])
    monkeypatch.setattr(console.out, "width", 200)
    assert text in text_of(console.claims_table([claim])) and text in write(run).read_text()
    monkeypatch.setattr(console.out, "width", 80)
    narrow = text_of(console.claims_table([claim]))
    assert f"    {text}\n" in "\n".join(line.rstrip() for line in narrow.splitlines()) + "\n"
    assert max(map(len, narrow.splitlines())) <= 80
    kept = json.loads(json.dumps(claim)) | {"interval": {}}  # of an earlier version
    assert "change of math 0.000 [?, ?]" in text_of(console.claims_table([kept]))


def test_a_report_that_a_run_writes_says_how_it_ended(run):
    with lock(run / ".lock", "it"):
        assert "running" in write(run).read_text() and status(run)["state"] == "running"
        page = write(run, at_end=True).read_text()
        assert "<span class=done>done</span>, as of 20" in page and "running" not in page
    put(run, "eval_more", status="failed", error="no")
    with lock(run / ".lock", "it"):
        assert "<span class=failed>failed</span>" in write(run, at_end=True).read_text()


def test_a_running_stage_has_seconds_so_far_and_a_killed_one_those_it_was_seen_for(run):
    now, place = time.time(), run.stage("base")
    running = {"status": "running", "attempt": 2, "seconds": 30.0, "began": now - 12}
    put(run, "base", **running)
    with lock(place / ".lock", "it"):
        state = status(run)
        stage = state["stages"]["base"]
        assert stage["status"] == "running" and 42 <= stage["seconds"] < 60
        assert f" {stage['seconds']:.1f} " in text_of(console.status_table(state))
    rows = [{"step": 1, "attempt": a, "time": now - 12 + s} for a, s in ((1, 900), (2, 7))]
    (place / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    stage = status(run)["stages"]["base"]
    assert stage["status"] == "interrupted" and stage["seconds"] == pytest.approx(37.0)
    del running["began"]  # a run of an earlier version
    put(run, "base", **running)
    assert status(run)["stages"]["base"]["seconds"] == 30.0


def test_claims_of_a_recipe_without_any(tmp_path, capsys):
    stages = {"base": {"kind": "pretrain", "steps": 1}}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1", "answer": "1"}) + "\n")
    data = {"sums": {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}}
    run = new_run(resolve({"name": "r", "data": data, "stages": stages}, "r"), "", tmp_path / "run")
    code, out, err = command("claims", run.path)
    assert code == 0 and out == "" and "makes no claims" in err and "opdctl ls claims" in err
    code, out, _ = command("claims", run.path, "--json")
    assert code == 0 and json.loads(out) == {"claims": []}
