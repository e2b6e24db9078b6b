"""A real vLLM server as the engine: weights go to it over HTTP, its samples are the trainer's."""

import json
import signal
import string
import time

import pytest
import torch
from serving import served_by_vllm
from test_vllm import ask, folder_of, gap, needs_vllm

from conftest import ALPHABET
from opdctl.config.settings import Runtime
from opdctl.errors import StageFailed
from opdctl.models.model import load
from opdctl.rollout.engines.transformers import Transformers
from opdctl.rollout.engines.vllm_server import VllmServer
from opdctl.run.rundir import RunDir, read_rows
from opdctl.train.wal import Wal
from running import start

pytestmark = [pytest.mark.vllm, needs_vllm]


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """A server of a tied and one of an untied model, started together, with padded rows."""
    folder = tmp_path_factory.mktemp("sampling")
    letters = ALPHABET + string.ascii_uppercase  # as it starts, the server encodes some
    for name in ("tied", "untied"):
        folder_of(folder, name, tied=name == "tied", extra_rows=8, alphabet=letters)
    how = ("opdctl.rollout.engines._vllm_serve",)
    with (
        served_by_vllm(folder / "a.log", *how, str(folder / "tied")) as tied,
        served_by_vllm(folder / "b.log", *how, str(folder / "untied")) as untied,
    ):
        tied.folder, untied.folder = folder / "tied", folder / "untied"
        for server in (tied, untied):
            server.wait_until_it_answers()
        yield {"tied": tied, "untied": untied}


def engine_of(server, model, wal=None, **keys):
    at = {"engine": "vllm_server", "engine_at": server.url, "server_timeout": 20.0}
    return VllmServer(model, 64, lambda: None, wal, Runtime(**at | keys))


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_tokens_and_log_probs_are_the_trainers_after_every_update(servers, name, tmp_path):
    """Greedy tokens as from transformers, log-probs within 1e-4, before and after each of two
    updates; with padded rows that would win if they were not masked."""
    model = load(str(servers[name].folder))
    with torch.no_grad():
        model.net.get_input_embeddings().weight[model.valid_V :] = 9.0
        model.head.weight[model.valid_V :] = 9.0
    wal = Wal(tmp_path / "wal")
    wal.at(0)
    engine = engine_of(servers[name], model, wal, engine_share=str(tmp_path))
    for version in range(3):
        if version:
            torch.manual_seed(version)
            with torch.no_grad():
                for parameter in model.net.parameters():
                    parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            stale = ask(engine, model, keys=range(90, 95), times=1)
            assert gap(model, *stale) > 0.05  # the update does change what is sampled
        engine.publish(version)
        wal.at(version + 1)
        _, greedy = ask(engine, model, temperature=0.0, times=1)
        _, theirs = ask(Transformers(model, 64), model, temperature=1e-7, times=1)
        assert [s.ids for s in greedy] == [s.ids for s in theirs]
        for temperature in (1.0, 0.7):
            prompts, samples = ask(engine, model, temperature=temperature, times=3)
            assert gap(model, prompts, samples, temperature) < 1e-4
            assert max(i for s in samples for i in s.ids) < model.valid_V
            assert len({tuple(s.ids) for s in samples}) > 5
    assert not list(tmp_path.glob("*.safetensors"))
    asked = servers[name].requests("/v1/completions")
    wal.at(0)
    wal.at(3)  # as a later attempt finds it
    _, again = ask(engine, model, temperature=0.7, times=3)
    assert again == samples and servers[name].requests("/v1/completions") == asked


@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize("last", ["/start_weight_update", "/update_weights"])
def test_a_publication_that_was_cut_is_made_good_by_the_next(servers, name, last):
    """Killed between two of its calls: the server takes the next weights, and samples with them."""
    model = load(str(servers[name].folder))
    cut = engine_of(servers[name], model)
    post = cut._post

    def until(path, body):
        post(path, body)
        if path == last:
            raise KeyboardInterrupt

    cut._post = until
    with pytest.raises(KeyboardInterrupt):
        cut.publish(0)
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    engine = engine_of(servers[name], model)
    engine.publish(0)
    assert gap(model, *ask(engine, model, keys=range(70, 75), times=1)) < 1e-4


def test_weights_of_another_are_noticed(servers):
    model = load(str(servers["tied"].folder))
    ours, theirs = (engine_of(servers["tied"], model) for _ in "ab")
    ours.publish(0)
    theirs.publish(0)
    with pytest.raises(StageFailed, match="has weights of version"):
        ask(ours, model, times=1)
    ours.publish(1)
    ask(ours, model, times=1)


def test_a_stage_whose_engine_is_killed(servers, tmp_path):
    """Through the command line: log-probs are the trainer's in every step, the failure names the
    server within the timeout, and what was sampled is kept."""
    server = servers["untied"]
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(40)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    opd = {"kind": "opd", "student": str(server.folder), "steps": 100000}
    opd |= {"teachers": {"teacher": str(servers["tied"].folder)}, "prompts": {"per_step": 6}}
    engine = {"engine": "vllm_server", "engine_at": server.url, "server_timeout": 5}
    recipe = {
        "name": "sampled",
        "data": {"sums": {"kind": "jsonl", "path": str(tmp_path / "sums.jsonl")}},
        "runtime": {**engine, "checkpoint_every": 2},
        "stages": {"opd": opd | {"sampling": {"max_tokens": 6}, "optim": {"lr": 0.01}}},
    }
    (tmp_path / "sampled.json").write_text(json.dumps(recipe))
    run = RunDir(tmp_path / "run")
    metrics = run.stage("opd") / "metrics.jsonl"
    process = start("run", tmp_path / "sampled.json", "--out", run.path)
    while process.poll() is None and not (metrics.exists() and len(read_rows(metrics)) > 4):
        time.sleep(0.05)
    assert process.poll() is None, (run / "logs" / "latest").read_text()
    server.signal(signal.SIGKILL)
    assert process.wait(60) == 1
    error = run.record("opd")["error"]
    assert f"the vllm engine ({server.url})" in error and "server_timeout" in error
    found = read_rows(metrics)
    assert len(found) > 4 and all(r["logprob_gap"] < 1e-4 for r in found)
    assert run.record("opd")["revisions"]["engines/vllm_server"] == 1
