"""A real vLLM server as teacher and as a source of texts: it scores, hangs, and is killed."""

import json
import signal
import string
import time

import pytest
import torch
from one_step import First, apart
from serving import served_by_vllm
from test_vllm import folder_of, needs_vllm

from conftest import ALPHABET, make_model
from opdctl.checks.preflight._checked_stage import CheckedStage
from opdctl.checks.preflight._run_checks import check
from opdctl.checks.preflight.step0 import divergence_and_overlap, served_divergence
from opdctl.config.registry import member
from opdctl.config.settings import Runtime
from opdctl.errors import StageFailed, UsageError
from opdctl.models.model import load, save
from opdctl.rollout.engines.vllm_server import VllmServer
from opdctl.run import provenance
from opdctl.run.fingerprint import fingerprints
from opdctl.run.plan import ready
from opdctl.run.rundir import RunDir, read_rows, write_json
from opdctl.scoring.asks import LOGPROBS, PLAIN
from opdctl.scoring.score import score
from opdctl.train.wal import entries
from opdctl.types import ScoreRequest
from running import carry_out, one_stage, start

pytestmark = [pytest.mark.vllm, needs_vllm]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models s (a student) and t (a teacher), one of another tokenizer, and prompts.

    Their tokenizers have capitals: as it starts, the server encodes some.
    """
    folder, letters = tmp_path_factory.mktemp("served"), ALPHABET + string.ascii_uppercase
    for seed, name in enumerate("st"):
        folder_of(folder, name, seed=seed, alphabet=letters)
    save(make_model(alphabet=letters.replace(",", ";")), folder / "other")
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(40)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """The process of a vLLM server of model t; its address is ``url``."""
    with served_by_vllm(folder / "server.log", *command(folder)) as process:
        process.wait_until_it_answers()
        yield process


def command(folder):
    module = "vllm.entrypoints.openai.api_server"
    return (module, "--model", str(folder / "t"), "--served-model-name", "big")


def context(folder, place, url, *overrides, **keys):
    given = {"kind": "opd", "student": str(folder / "s"), "teachers": {"teacher": url}, **keys}
    data = {"sums": {"kind": "jsonl", "path": str(folder / "sums.jsonl")}}
    ctx = one_stage(place, data, *overrides, **given)
    ctx.wal.at(0)
    return ctx


def requests_of(model):
    spans = [model.render(f"{i}+{i * i}=") + model.encode(str(i)) for i in range(1, 40)]
    spans = [ScoreRequest(tuple(ids), len(ids) - 2) for ids in spans]
    ids = (*spans[0].ids, *spans[1].ids)
    return [*spans, ScoreRequest(ids, 3, ((5, 8),)), ScoreRequest(spans[2].ids[:2], 1)]


def test_scores_are_those_of_the_weights(folder, server, tmp_path):
    """Within 1e-4 of transformers, several turns and one-token answers included."""
    ctx = context(folder, tmp_path / "run", server.url, "runtime.server_batch=5")
    student, teacher = load(str(folder / "s")), load(str(folder / "t"))
    requests = requests_of(student)
    served = member("teachers", "server")(ctx, student, "big", server.url)
    found = served.score(requests, LOGPROBS, PLAIN)
    expected = score(teacher, requests).logprobs_N
    assert len(found.logprobs_N) == sum(map(len, requests))
    assert (found.logprobs_N - expected).abs().max() < 1e-4
    too_long = ScoreRequest((1,) * 200, 3)
    with pytest.raises(StageFailed, match="reads at most 128 tokens"):
        served.score([too_long], LOGPROBS, PLAIN)


LISTS = {
    "tail": {"direction": "reverse"},
    "jsd": {"direction": "jsd", "beta": 0.3},
    "revisiting": {"direction": "reverse", "form": "renormalised"},
    "generalised": {"direction": "forward", "form": "generalised"},
    "eopd": {"direction": "forward", "form": "truncated", "weights": {"eopd": {"over": "listed"}}},
}


@pytest.mark.parametrize("name", LISTS)
def test_its_top_k_trains_as_that_of_its_weights(folder, server, tmp_path, name):
    """Ids, log-probs, loss and gradient of each form, against the same model from its folder."""
    divergence = {"support": "topk_teacher", "k": 8, **LISTS[name]}
    keys = {"signals": {}, "objectives": {"divergence": divergence}}
    here, there = (
        First(context(folder, tmp_path / str(i), model, "stages.it.prompts.per_step=12", **keys))
        for i, model in enumerate((str(folder / "t"), server.url))
    )
    assert [r.response_ids for r in here.rollouts] == [r.response_ids for r in there.rollouts]
    ours, theirs = here.step.teacher_cache.held[0], there.step.teacher_cache.held[0]
    assert (ours.top_NK == theirs.top_NK).all() and theirs.head is None
    rows_N = torch.arange(len(ours.top_NK))
    asked = (torch.zeros_like(rows_N), rows_N, ours.top_NK)
    exact_NK, given_NK = (f.step.teacher_cache.logprobs_at(*asked)[0] for f in (here, there))
    assert (exact_NK - given_NK).abs().max() < 1e-4
    loss, gradient, table = here.gradient()
    again, theirs, their_table = there.gradient()
    assert abs(loss - again) < 1e-4 and apart(theirs, gradient) < 1e-3
    logged = ["divergence", "overlap", "overlap_mass", "overlap_teacher_mass", "teacher_logprob"]
    assert all((table[n] - their_table[n]).abs().max() < 1e-3 for n in logged)
    assert "teacher_entropy" in table and "teacher_entropy" not in their_table
    if name == "eopd":
        assert torch.allclose(*(f.columns["teacher_topk_list_entropy"] for f in (here, there)))
        gate_N = here.columns["factor.divergence.eopd"]
        assert (
            0 < gate_N.float().mean() < 1
            and (gate_N == there.columns["factor.divergence.eopd"]).all()
        )


def test_the_most_probable_token_guards_an_extrapolation(folder, server, tmp_path):
    keys = {"signals": {"extrapolation": {"guard": "reference"}}, "reference": "policy"}
    here, there = (
        First(context(folder, tmp_path / str(i), model, **keys))
        for i, model in enumerate((str(folder / "t"), server.url))
    )
    assert (here.columns["teacher_top1_id"] == there.columns["teacher_top1_id"]).all()
    for column in ("teacher_top1", "advantage"):
        assert (here.columns[column] - there.columns[column]).abs().max() < 1e-3


def test_a_server_that_lists_fewer_is_refused_at_the_start(folder, server, tmp_path):
    keys = {"signals": {}, "objectives": {"divergence": {"support": "topk_teacher", "k": 21}}}
    with pytest.raises(UsageError, match=r"does not list the 21 most.*\n.*--max-logprobs 21"):
        First(context(folder, tmp_path / "run", server.url, **keys))


def test_another_tokenizer_is_refused_by_its_first_id(folder, server, tmp_path):
    ctx = context(folder, tmp_path / "run", server.url)
    other = load(str(folder / "other"))
    with pytest.raises(UsageError, match=r"teacher big \(http.*id 5 is ',' there and '0' here"):
        member("teachers", "server")(ctx, other, "big", server.url)


def test_other_weights_under_the_same_name_are_noticed(folder, server, tmp_path):
    """By the log-probs of a known sequence; not by what another batch or precision rounds."""
    ctx = context(folder, tmp_path / "run", server.url)
    key = "teachers.teacher.model"
    found = provenance.inputs(ctx.run, ctx.recipe, "it")
    values = [float(v) for v in found[key]["probe"].split()]
    requests = [ScoreRequest(tuple(provenance.PROBE), 1)]
    exact = score(load(str(folder / "t")), requests).logprobs_N
    assert (torch.tensor(values) - exact).abs().max() < 1e-3  # three digits are kept
    other = score(load(str(folder / "s")), requests).logprobs_N

    def seen(logprobs):
        said = {**found[key], "probe": " ".join(f"{v:.3f}" for v in logprobs)}
        record = {"fingerprint": fingerprints(ctx.recipe)["it"], "inputs": {key: said}}
        write_json(ctx.folder / "stage.json", record)
        provenance.require_unchanged(ctx.run, ctx.recipe, "it", found)

    seen(values)
    seen([v + (0.09 if i % 2 else -0.005) for i, v in enumerate(values)])
    with pytest.raises(UsageError, match=r"teachers.teacher.model: http.*its probe changed"):
        seen(other.tolist())
    with pytest.raises(UsageError, match="its probe changed"):
        seen(values[:-1])


def test_everything_is_looked_at_before_a_run(folder, server, tmp_path):
    """What ``validate --deep`` does: the teacher, a source and a judge behind the same server."""
    ctx = context(folder, tmp_path / "run", f"{server.url}#big")
    by_check = {f.check: f for f in check(ctx, deep=True) if f.teacher == "teacher"}
    assert by_check.keys() == {"served", "gain", "step0"}
    assert by_check["served"].severity == "ok" and "reads 128 tokens" in by_check["served"].what
    assert "teacher 0.00, student 0.00" in by_check["gain"].what
    name = ctx.config.student
    checked = CheckedStage(ctx)
    requests = [r.request for r in checked.rollouts]
    kl, error, overlap, k = served_divergence(checked, "teacher", requests)
    checked.teachers["folder"] = str(folder / "t")
    exact, their_overlap, same_k = divergence_and_overlap(checked, "folder", requests)
    assert k == same_k and abs(overlap - their_overlap) < 1e-6
    assert abs(kl - exact) < 4 * error and f"KL {kl:.4g}" in by_check["step0"].what
    alone = served_divergence(checked, "teacher", requests, lists=False)
    assert alone[0] == pytest.approx(kl, abs=1e-5) and alone[2] == 1.0
    wrong = check(context(folder, tmp_path / "wrong", f"{server.url}#small"), deep=True)
    assert {(f.check, f.severity) for f in wrong if f.teacher} == {("served", "error")}
    judge = {"judge_server": {"url": f"{server.url}/v1", "name": "big", "timeout": 5.0}}
    data = {"kind": "jsonl", "path": str(folder / "sums.jsonl"), "verifier": judge}
    source = {"teacher": {"model": server.url}}
    stage = {"kind": "sft", "student": name, "steps": 1, "sources": source}
    ctx = one_stage(tmp_path / "sft", {"sums": data}, **stage)
    assert ready(ctx.recipe)[0] == ["it"]
    assert [(f.check, f.severity) for f in check(ctx, deep=True)] == [("served", "ok")] * 2
    judge["judge_server"]["name"] = source["teacher"]["model"] = f"{server.url}#none"
    ctx = one_stage(tmp_path / "none", {"sums": data}, **stage)
    found = check(ctx, deep=True)
    assert [f.severity for f in found] == ["error"] * 2 and all("big" in f.what for f in found)


def test_a_server_that_was_not_started_to_sample_is_refused(folder, server):
    model = load(str(folder / "s"))
    at = Runtime(engine="vllm_server", engine_at=server.url, server_timeout=20.0)
    with pytest.raises(UsageError, match=r"takes no weights.*\n.*_vllm_serve DIR"):
        VllmServer(model, 4, lambda: None, None, at)


def test_its_texts_train_a_student(folder, server, tmp_path):
    source = {"teacher": {"model": server.url, "keep": "all", "sampling": {"max_tokens": 8}}}
    stage = {"kind": "sft", "student": str(folder / "s"), "steps": 3, "sources": source}
    data = {"sums": {"kind": "jsonl", "path": str(folder / "sums.jsonl")}}
    rows = carry_out(one_stage(tmp_path / "run", data, **stage, prompts={"per_step": 6}))
    assert len(rows) == 3 and all(r["tokens"] > 0 and r["grad_norm"] > 0 for r in rows)


def test_a_server_that_hangs_is_named_within_the_timeout_and_then_goes_on(folder, server, tmp_path):
    ctx = context(folder, tmp_path / "run", server.url, "runtime.server_timeout=30")
    student = load(str(folder / "s"))
    teacher = member("teachers", "server")(ctx, student, "big", server.url)
    server.signal(signal.SIGSTOP)
    try:
        teacher.endpoint.timeout, begun = 2.0, time.monotonic()
        with pytest.raises(StageFailed, match=r"teacher big \(http.*within 2 s \(tries: 1\)"):
            teacher.score(requests_of(student)[:3], LOGPROBS, PLAIN)
        assert time.monotonic() - begun < 10
    finally:
        server.signal(signal.SIGCONT)
    teacher.endpoint.timeout = 60.0
    assert len(teacher.score(requests_of(student)[:3], LOGPROBS, PLAIN).logprobs_N) == 6


def test_a_server_killed_in_the_middle_of_a_step(folder, server, tmp_path):
    """Through the command line: the failure names the teacher, no step is taken without scores,
    and a resume at another address asks for what the step in hand still lacks."""
    opd = {
        "kind": "opd",
        "student": str(folder / "s"),
        "teachers": {"big": {"model": server.url, "serves": {"sums": True}}},
        "steps": 9,
        "prompts": {"per_step": 30},
        "sampling": {"max_tokens": 6},
    }
    runtime = {"server_timeout": 5, "checkpoint_every": 2, "server_batch": 1, "server_requests": 1}
    recipe = {
        "name": "killed",
        "data": {"sums": {"kind": "jsonl", "path": str(folder / "sums.jsonl")}},
        "runtime": {**runtime, "log_rollouts_every": 1, "log_rollouts": 1000},
        "stages": {"opd": opd},
    }
    (tmp_path / "killed.json").write_text(json.dumps(recipe))
    run = RunDir(tmp_path / "run")
    metrics, log = run.stage("opd") / "metrics.jsonl", run / "logs" / "latest"
    process = start("run", tmp_path / "killed.json", "--out", run.path)
    while process.poll() is None and not 3 <= answered(run, least=4) <= 20:
        time.sleep(0.002)
    server.signal(signal.SIGKILL)
    assert process.wait(300) == 1, log.read_text()
    record, rows = run.record("opd"), read_rows(metrics)
    assert record["status"] == "failed" and f"teacher big ({server.url})" in record["error"]
    assert "stages.opd.teachers.big.at=" in record["error"]
    assert record["inputs"]["teachers.big.model"]["served"] == "big"
    assert [r["step"] for r in rows] == list(range(1, len(rows) + 1)) and 3 < len(rows) < 9
    kept = answered(run, least=len(rows))  # of the step that was in hand
    assert kept >= 3
    with served_by_vllm(folder / "again.log", *command(folder)) as again:
        again.wait_until_it_answers()
        assert start("resume", run.path, f"stages.opd.teachers.big.at={again.url}").wait(300) == 0
        asked = again.requests("/v1/completions")
    after = read_rows(metrics)
    assert [r["step"] for r in after] == list(range(1, 10)) and after[-1]["attempt"] == 2
    assert all(r["grad_norm"] > 0 for r in after)
    distinct = [differing(run, step) for step in range(len(rows) + 1, 10)]
    known = 2  # sequences: the record's, which tells other weights, and the teacher's own
    assert kept < distinct[0] and asked == sum(distinct) - kept + known


def answered(run, least):
    """Teacher's answers in the log of the newest step, if it is not before ``least``."""
    found = sorted((run.stage("opd") / "wal").glob("step-*"))
    if not found or int(found[-1].name[5:]) < least:
        return 0
    return sum(name.startswith("teacher big") for name, _, _ in entries(found[-1].read_bytes()))


def differing(run, step):
    """How many different responses a step had."""
    path = run.stage("opd") / "rollouts" / f"step-{step:06d}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 30
    return len({(r["prompt"], *r["ids"]) for r in rows})
