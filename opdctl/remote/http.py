"""One exchange of JSON over HTTP, with a deadline, a limit on the size, and no redirects.

The standard library's timeout applies to each read of the socket, so a server that writes a byte
now and then would hold a request forever; and it follows redirects with the key. Here every read
has the rest of the time only, and a redirect is an answer like any other that is not 200.
"""

from __future__ import annotations

import http.client
import io
import json
import ssl
import time
import urllib.error
import urllib.request
from typing import Any

from opdctl.config.secrets import masked

PIECE = 1 << 20
LARGEST = 1 << 30  # bytes of any answer
ROOM = 16 << 20  # bytes of an answer beside its log-probs
ENTRY = 256  # bytes of one log-prob of one token, with its text
REFUSAL = 2000  # bytes of a refusal that are read


class Refused(Exception):
    """An answer that is not 200.

    Args:
        code: the HTTP status.
        text: the body of the answer.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"it answered {code}: {text[:300]}")
        self.code = code


def exchange(url: str, body: dict | None, key: str, seconds: float) -> dict:
    """Send a GET, or with a body a POST, and return the JSON object of the answer.

    Args:
        key: a secret to send along; empty for none.
        seconds: the time from the connection to the last byte.

    Raises:
        Refused: the answer is not 200: a redirect or a part (206) is none.
        ValueError: the answer is no JSON object, or larger than such an answer can be.
        OSError, http.client.HTTPException: no answer, or a part of one.
    """
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    try:
        with OPENER.open(request, timeout=seconds) as reply:
            if reply.status != 200:
                raise Refused(reply.status, masked(reply.read(REFUSAL).decode(errors="replace")))
            framed = _is_framed(reply)
            raw = _whole(reply, largest_answer(body))
    except urllib.error.HTTPError as error:
        with error:
            text = error.read(REFUSAL).decode(errors="replace").strip()
        if 300 <= error.code < 400:
            text = f"ask {error.headers.get('Location')} instead; that is not done by itself"
        raise Refused(error.code, masked(text)) from None
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        if not framed and isinstance(error, ValueError) and raw.lstrip()[:1] in (b"", b"{"):
            raise http.client.IncompleteRead(b"") from None  # only its end would have told
        raise ValueError(f"its answer is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"its answer is no JSON object but a {type(content).__name__}")
    return content


def largest_answer(body: dict | None) -> int:
    """Return the most bytes that an answer to a question can have, by the log-probs it asks for."""
    if body is None:
        return min(ROOM, LARGEST)
    lists = [body.get(name) for name in ("prompt_logprobs", "logprobs", "top_logprobs")]
    listed = 2 + max((n for n in lists if isinstance(n, int)), default=0)
    written = body.get("max_tokens") or body.get("max_completion_tokens") or 0
    tokens = len(json.dumps(body)) // 2 + written * (body.get("n") or 1)  # an id has 2 letters
    return min(ROOM + ENTRY * listed * tokens, LARGEST)


def _is_framed(reply) -> bool:
    """Return True if the head of an answer says where it ends.

    Raises:
        HTTPException: it says so in a way that cannot be.
    """
    lengths = set(reply.headers.get_all("Content-Length") or [])
    if len(lengths) > 1 or not all(n.strip().isascii() and n.strip().isdigit() for n in lengths):
        raise http.client.HTTPException(f"its Content-Length is {', '.join(lengths):.80}")
    return bool(lengths) or reply.chunked


def _whole(reply, largest: int) -> bytes:
    pieces, size = [], 0
    while piece := reply.read(PIECE):
        pieces.append(piece)
        size += len(piece)
        if size > largest:
            raise ValueError(f"its answer is larger than {largest} bytes")
    if reply.length:  # reading in pieces does not tell
        raise http.client.IncompleteRead(b"", reply.length)
    return b"".join(pieces)


class _Timed(io.RawIOBase):
    """A raw stream of a socket that can be read until ``end``, a time of ``time.monotonic``."""

    def __init__(self, sock, end: float) -> None:
        self.sock, self.raw, self.end = sock, sock.makefile("rb", 0), end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self.sock.settimeout(left)
        return self.raw.readinto(buffer)

    def close(self) -> None:
        self.raw.close()
        super().close()


class _Connection(http.client.HTTPConnection):
    def __init__(self, host: str, *, timeout: float = 0.0, **keys: Any) -> None:
        super().__init__(host, timeout=timeout, **keys)
        end = time.monotonic() + timeout

        class Response(http.client.HTTPResponse):
            def __init__(self, sock, *args: Any, **keys: Any) -> None:
                super().__init__(sock, *args, **keys)
                self.fp.close()
                self.fp = io.BufferedReader(_Timed(sock, end))

        self.response_class = Response


class _Secure(_Connection, http.client.HTTPSConnection):
    """A connection over TLS."""


class _Plain(urllib.request.HTTPHandler):
    def http_open(self, req):
        return self.do_open(_Connection, req)


class _Tls(urllib.request.HTTPSHandler):
    def __init__(self) -> None:
        self.context = ssl.create_default_context()
        self.context.set_alpn_protocols(["http/1.1"])  # as http.client does by itself
        super().__init__(context=self.context)

    def https_open(self, req):
        return self.do_open(_Secure, req, context=self.context)


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl) -> None:
        """Return None: the redirect itself is the answer."""


OPENER = urllib.request.build_opener(_Plain, _Tls, _Stay)
