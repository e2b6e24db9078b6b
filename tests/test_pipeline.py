"""Modes, turns, sources by domain and gradients through the command line, killed and resumed."""

import json
import signal

import pytest
import torch
from test_resume import IN_COMMIT, IN_SAMPLING, copy_without

from opdctl.evidence.measured import stage_facts
from opdctl.run.rundir import RunDir, read_json, read_rows
from opdctl.train.gradients import summary
from running import HERE, assert_same, inside, worker

MODES = HERE / "modes.yaml"


@pytest.fixture(scope="session")
def modes_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "modes"
    done = inside("run", MODES, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


def rollouts(run, stage):
    for path in sorted(RunDir(run).stage(stage).glob("rollouts/*.jsonl")):
        yield from map(json.loads, path.read_text().splitlines())


def test_what_a_run_leaves(modes_run):
    run = RunDir(modes_run)
    written = [r for r in rollouts(run.path, "base") if r["domain"] == "agent"]
    assert written and all("advantage" not in r for r in written)
    for row in written:
        call, reply = row["before"]
        assert call == "[" + row["prompt"][1:-1] + "]" and reply == row["answer"]
    said = list(rollouts(run.path, "merged"))
    assert {r["domain"] for r in said} == {"math_think", "math_no_think", "agent"}
    assert any("before" in r for r in said), "no sample made a call"
    rows = read_rows(run.stage("merged") / "metrics.jsonl")
    assert all(r["teachers"] == r["head_loads"] == 3 and r["heads"] == 2 for r in rows)
    assert rows[0]["accuracy"].keys() == {"math_think", "math_no_think", "agent"}
    results = {r["domain"]: r for r in read_json(run.stage("eval_merged") / "results.json", list)}
    for row in results.values():
        assert sum(row["tokens"]) == pytest.approx(row["mean_tokens"] * row["n"])
        assert 0 <= sum(row["right"]) <= sum(row["obeyed"]) <= row["n"]
    assert results["math_think"]["mean_tokens"] > results["math_no_think"]["mean_tokens"] + 2
    assert results["agent"]["obedience"] == 1.0
    for mode in ("think", "no_think"):  # so little trained, it does not always obey
        row = results[f"math_{mode}"]
        assert row["obedience"] == sum(row["obeyed"]) / row["n"] < 1.0
    assert all(r["teacher_loads"] >= 3 for r in rows[1:])  # one resident: each is read again


def test_claims_of_the_run(modes_run):
    found = {
        c["name"]: c for c in json.loads(inside("claims", modes_run, "--json").stdout)["claims"]
    }
    assert found["D2"]["holds"] is True and found["D3"]["holds"] is True
    assert all(c["measured"] for c in found.values()), found
    facts = read_json(RunDir(modes_run).stage("variance") / "facts.json")
    ratio = facts["variance of policy_gradient"] / facts["variance of divergence"]
    assert found["D1"]["measured"]["variance, sampled to full"] == pytest.approx(ratio)
    flops = {s: RunDir(modes_run).record(s)["compute"]["flops"] for s in ("merged", "t_think")}
    student = {s: f["rollout"] + f["train"] for s, f in flops.items()}
    ratio = student["merged"] / student["t_think"]
    assert found["Q1"]["measured"]["flops, OPD to RL"] == pytest.approx(ratio)
    assert found["Q1_all"]["measured"]["flops, OPD to RL"] > ratio


def test_what_a_stage_that_trains_nothing_measured_is_shown(modes_run):
    facts = stage_facts(RunDir(modes_run))["variance"]
    assert facts == read_json(RunDir(modes_run).stage("variance") / "facts.json")
    assert inside("report", modes_run).returncode == 0
    page = (modes_run / "report.html").read_text()
    for name, value in facts.items():
        assert f"<td class=''>{name}</td><td class=''>{value:.4g}</td>" in page


def test_sources_by_domain(modes_run):
    said = list(rollouts(modes_run, "fused"))
    sampled = RunDir(modes_run).record("fused")["compute"]["teacher_sampled_tokens"]
    assert {r["domain"] for r in said} == {"math_think", "math_no_think", "agent"}
    assert sampled > 0 and len({r["prompt"] for r in said}) > 10
    for keys, says in (
        (["stages.fused.sources.teacher.domains={}"], "which domains"),
        (["stages.fused.sources.dataset.domains={agent: true}"], "no source has 'math_no_think'"),
        (["stages.fused.sources.dataset.domains={math_think: true}"], "two sources have"),
        (["stages.fused.sources.teacher.domains={maths: true}"], "no prompt here is of 'maths'"),
        (["stages.fused.sources={student: {}}"], "sft takes dataset, teacher, or both"),
        (["stages.fused.sources.teacher.domains={agent: false}"], "no domain that is true"),
    ):
        done = inside("validate", MODES, *keys)
        assert done.returncode == 2 and says in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("stage", "patch", "n"),
    [
        ("fused", IN_SAMPLING, 30),
        ("merged", IN_SAMPLING, 45),
        ("merged", IN_COMMIT, 1),
        ("variance", IN_SAMPLING, 40),
        ("variance", IN_COMMIT, 2),
        ("eval_merged", IN_SAMPLING, 30),
    ],
)
def test_killed_and_resumed(modes_run, tmp_path, stage, patch, n):
    copy_without(modes_run, tmp_path / "run", stage)
    killed = worker(tmp_path / "run", stage, patch.replace("{n}", str(n)))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert worker(tmp_path / "run", stage).returncode == 0
    assert_same(modes_run, tmp_path / "run", [stage])
    facts = [RunDir(r).stage(stage) / "facts.json" for r in (modes_run, tmp_path / "run")]
    assert stage != "variance" or facts[0].read_bytes() == facts[1].read_bytes()


def test_gradients_of_a_reward(modes_run, tmp_path):
    folder = tmp_path / "again"
    signals = "stages.variance.signals={reverse_kl: {}, outcome: {coef: 0.2}}"
    more = ("stages.variance.prompts.samples=2", "stages.variance.batches=2")
    done = inside("run", MODES, "--from", modes_run, "--out", folder, signals, *more)
    assert done.returncode == 0, done.stderr
    facts = [read_json(RunDir(f).stage("variance") / "facts.json") for f in (modes_run, folder)]
    assert facts[0]["norm of policy_gradient"] != facts[1]["norm of policy_gradient"]


def test_heads_on_disk_change_nothing(modes_run, tmp_path):
    """All teachers resident: the same bits, and all three heads in memory."""
    copy_without(modes_run, tmp_path / "run", "merged")
    resolved = tmp_path / "run" / "resolved.yaml"
    text = resolved.read_text()
    assert text.count("resident_teachers: 1") == 1
    resolved.write_text(text.replace("resident_teachers: 1", "resident_teachers: 0"))
    assert worker(tmp_path / "run", "merged").returncode == 0
    runs = [RunDir(r) for r in (modes_run, tmp_path / "run")]
    weights = [(r.output("merged") / "model.safetensors").read_bytes() for r in runs]
    assert weights[0] == weights[1]
    heads = [{row["heads"] for row in read_rows(r.stage("merged") / "metrics.jsonl")} for r in runs]
    assert heads == [{2}, {3}]


def test_summary_is_variance_and_cosine():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 7, generator=generator, dtype=torch.float64) + 1
    b = a + torch.randn(40, 7, generator=generator, dtype=torch.float64)
    sums = {"a": a.sum(0), "b": b.sum(0)}
    squares = {"a": float((a**2).sum()), "b": float((b**2).sum())}
    found = summary(sums, squares, 40)
    for name, values in (("a", a), ("b", b)):
        assert found[f"variance of {name}"] == pytest.approx(float(values.var(0).sum()))
        assert found[f"norm of {name}"] == pytest.approx(float(values.mean(0).norm()))
    cosine = torch.nn.functional.cosine_similarity(a.mean(0), b.mean(0), dim=0)
    assert found["cosine of a and b"] == pytest.approx(float(cosine))
    nothing = summary({"a": a.sum(0) * 0, "b": b.sum(0)}, squares, 40)
    assert nothing["cosine of a and b"] == 0.0
