"""Exchanges with servers that drip, flood, break off, or send on to another."""

import contextlib
import time
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from serving import listening

from opdctl.errors import StageFailed
from opdctl.remote import http as module
from opdctl.remote.endpoint import Endpoint
from opdctl.remote.http import exchange


@contextlib.contextmanager
def answering(reply):
    """A server of which ``reply(handler)`` writes every answer; it keeps the keys it was sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.keys.append(self.headers.get("Authorization"))
            with contextlib.suppress(OSError):
                reply(self)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.keys, server.url = [], f"http://127.0.0.1:{server.server_port}"
    with listening(server):
        yield server


def drip(handler, raw):
    for letter in raw:
        handler.wfile.write(bytes([letter]))
        time.sleep(0.1)


def dripping_body(handler):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
    drip(handler, b'{"a": "' + b"x" * 100)


def dripping_head(handler):
    drip(handler, b"HTTP/1.0 200 OK\r\n" + b"X-Long: 1\r\n" * 20)


def dripping_refusal(handler):
    handler.wfile.write(b"HTTP/1.0 400 No\r\n\r\n")
    drip(handler, b"x" * 100)


@pytest.mark.parametrize("reply", [dripping_body, dripping_head, dripping_refusal])
def test_a_server_that_drips_is_held_to_the_deadline(reply):
    with answering(reply) as server:
        begun = time.monotonic()
        with pytest.raises(StageFailed, match=r"big: no answer to /x within 1 s .*did not answer"):
            Endpoint("big", server.url, 1.0).ask("/x")
        assert 0.7 < time.monotonic() - begun < 3


def with_body(raw, *headers):
    return lambda handler: handler.wfile.write(
        b"\r\n".join([b"HTTP/1.0 200 OK", *headers, b"", raw])
    )


def test_an_answer_has_a_largest_size(monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 3 << 20)
    too_large = pytest.raises(StageFailed, match="big: /x: its answer is larger than 3145728 bytes")
    with answering(with_body(b'"' + b"x" * (5 << 20) + b'"')) as server, too_large:
        Endpoint("big", server.url, 10.0).ask("/x")
    with answering(with_body(b'{"a": "' + b"x" * (2 << 20) + b'"}')) as server:
        assert len(exchange(server.url, None, "", 10.0)["a"]) == 2 << 20


def test_the_size_of_an_answer_is_bounded_by_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(module, "ROOM", 1 << 20)
    flood = with_body(b'{"a": "' + b"x" * (3 << 20) + b'"}')
    with answering(flood) as server, pytest.raises(StageFailed, match="larger than 1048576"):
        Endpoint("big", server.url, 10.0).ask("/x")
    ids = list(range(1000, 5000))
    asked = module.largest_answer({"prompt": [ids], "prompt_logprobs": 32, "max_tokens": 1})
    assert asked > 34 * 60 * len(ids)  # a server's entry is some 60 bytes
    drawn = module.largest_answer({"prompt": "a", "max_tokens": 8192, "n": 4, "logprobs": 1})
    assert drawn > 2 * 60 * 4 * 8192


@pytest.mark.parametrize("code", [201, 202, 204, 206])
def test_an_answer_that_is_not_200_is_none(code):
    def part(handler):
        handler.wfile.write(b'HTTP/1.0 %d Some\r\nContent-Length: 8\r\n\r\n{"a": 1}' % code)

    refused = pytest.raises(StageFailed, match=f"big: /x: it answered {code}")
    with answering(part) as server, refused:
        Endpoint("big", server.url, 5.0).ask("/x")


@pytest.mark.parametrize(
    "lengths",
    [[b"-1"], [b"+8"], [b"8", b"9"], [b"8, 9"], [b"0x8"], [b"\xc2\xb2"]],
)
def test_a_length_that_cannot_be_is_no_answer(lengths):
    headers = [b"Content-Length: " + length for length in lengths]
    with answering(with_body(b'{"a": 1}', *headers)) as server, pytest.raises(HTTPException):
        exchange(server.url, None, "", 10.0)


@pytest.mark.parametrize("kept", [0, 1, 9])
def test_an_answer_without_a_length_that_is_cut_is_asked_for_again(kept):
    whole, tries = b'{"a": "bcd"}', []

    def cut_once(handler):
        tries.append(1)
        with_body(whole if len(tries) > 1 else whole[:kept])(handler)

    with answering(cut_once) as server:
        assert Endpoint("big", server.url, 5.0).ask("/x") == {"a": "bcd"}
    assert len(tries) == 2


def test_an_answer_that_is_no_object_or_no_whole_is_refused():
    for raw, what in ((b"[1]", "no JSON object but a list"), (b"[" * 10**5, "is no JSON")):
        with answering(with_body(raw)) as server, pytest.raises(ValueError, match=what):
            exchange(server.url, None, "", 10.0)
    cut = with_body(b'{"a": 1}', b"Content-Length: 9")
    with answering(cut) as server, pytest.raises(HTTPException):
        exchange(server.url, None, "", 10.0)


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_a_key_is_not_taken_to_another_address(code):
    with answering(with_body(b"{}")) as other:

        def elsewhere(handler):
            handler.send_response(code)
            handler.send_header("Location", other.url + "/y")
            handler.end_headers()

        with answering(elsewhere) as server:
            with pytest.raises(StageFailed, match=rf"big: /x: it answered {code}: ask {other.url}"):
                Endpoint("big", server.url, 5.0, key="secret").ask("/x")
            assert server.keys == ["Bearer secret"]
        assert other.keys == []
