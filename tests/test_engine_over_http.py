"""The engine ``vllm_server`` against a small server that speaks its protocol, where things go wrong
at the worst moment; a real one is in test_vllm_engine.py.
"""

import contextlib
import json
import resource
import signal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from serving import listening
from test_vllm import folder_of

from conftest import make_model
from opdctl.config.settings import Runtime
from opdctl.errors import Interrupted, StageFailed
from opdctl.models.model import load
from opdctl.rollout.engines._vllm_serve import arguments
from opdctl.rollout.engines.vllm_server import ACTIVE, VllmServer
from opdctl.train.wal import Wal

OURS, OTHERS = 5, 9  # what the weights that were published sample, and what all others do


class Sampler(ThreadingHTTPServer):
    """Samples one token three times.

    Attributes:
        restart_after: answers until it has the weights it was started with.
        told: the paths of what was posted, in their order.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.version, self.restart_after, self.answered, self.told = "default", None, 0, []
        self.active = False


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, content, code=200):
        raw = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self):
        if self.path == "/v1/models":
            return self.reply({"data": [{"id": "m", "max_model_len": 128}]})
        return self.reply({"weight_version": self.server.version})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.told.append(self.path)
        if self.path == "/start_weight_update":
            if server.active:
                return self.reply({"error": {"message": f"start called while {ACTIVE}."}}, 500)
            server.active = True
        if self.path == "/finish_weight_update":
            server.version, server.active = body["weight_version"], False
        if self.path != "/v1/completions":
            return self.reply({})
        if server.answered == server.restart_after:
            server.version = "default"
        server.answered += 1
        ids = [OTHERS if server.version == "default" else OURS] * 3
        choice = {"token_ids": ids, "finish_reason": "length"}
        return self.reply({"choices": [choice | {"logprobs": {"token_logprobs": [-1.0] * 3}}]})


@pytest.fixture
def server():
    with listening(Sampler()) as sampler:
        yield sampler


def engine_of(server, place, wal=None, **keys):
    at = {"engine_at": server.url, "engine_share": str(place), "server_timeout": 5.0}
    return VllmServer(make_model(), 1, lambda: None, wal, Runtime(**at | keys))


def sampled(server, place):
    """First tokens of four responses and how many were in the log: an attempt as of a stage."""
    with contextlib.closing(Wal(place / "wal")) as wal:
        wal.at(0)
        engine = engine_of(server, place, wal)
        engine.publish(0)
        prompts, keys = [[1, 2, 3]] * 4, [11, 22, 33, 44]
        samples = engine.generate(prompts, keys, temperature=1.0, max_tokens=3)
        return [s.ids[0] for s in samples], wal.kept


def test_no_sample_of_other_weights_is_logged(server, tmp_path):
    """Started again in the middle of a rollout: what it then samples is no part of a resume."""
    server.restart_after = 2
    with pytest.raises(StageFailed, match="has weights of version 'default'"):
        sampled(server, tmp_path)
    server.restart_after = None
    assert sampled(server, tmp_path) == ([OURS] * 4, 2)  # the two that were right are kept


def test_a_stop_does_not_cut_a_publication(server, tmp_path):
    engine = engine_of(server, tmp_path)

    def check():
        if "/start_weight_update" in server.told:
            raise Interrupted("stopped")

    engine.check = check
    with pytest.raises(Interrupted):
        engine.publish(0)
    assert server.told[-1] == "/resume" and server.version == engine.label and not server.active


def test_a_publication_that_a_kill_cut_is_ended_by_the_next(server, tmp_path):
    server.active = True
    engine = engine_of(server, tmp_path)
    engine.publish(0)
    assert server.version == engine.label and not server.active


def test_a_full_share_is_named(server, tmp_path):
    """Its own name, and not that of the run's folder; the server is not paused for it."""
    engine = engine_of(server, tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(StageFailed, match=rf"runtime.engine_share: .* under {tmp_path}: .*27"):
            engine.publish(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "/pause?mode=abort" not in server.told and not list(tmp_path.iterdir())


def test_the_server_counts_ids_as_the_trainer_does(tmp_path):
    """Check a vocabulary with a hole, and more rows than ids: the last id is no padding."""
    folder_of(tmp_path, "m", extra_rows=8)
    path = tmp_path / "m" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] += 3
    path.write_text(json.dumps(tokenizer))
    flags = arguments(str(tmp_path / "m"), [])
    valid = json.loads(flags[flags.index("--additional-config") + 1])["valid"]
    model = load(str(tmp_path / "m"))
    assert valid == model.valid_V > len(model.tokenizer)
