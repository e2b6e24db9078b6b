"""The engine ``vllm_server`` against a small server that speaks its protocol, where things go wrong
at the worst moment; a real one is in test_vllm_engine.py.
"""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from conftest import make_model
from opdctl.core.wal import Wal
from opdctl.engines.vllm_server import VllmServer
from opdctl.errors import StageFailed
from opdctl.settings import Runtime

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
        if self.path == "/finish_weight_update":
            server.version = body["weight_version"]
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
    found = Sampler()
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


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
