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

PIECE = 1 << 20
LARGEST = 1 << 30  # bytes of an answer: 32 log-probs a token are some 2 KB
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
        Refused: the answer is not 200, redirects included.
        ValueError: the answer is no JSON object, or too large.
        OSError, http.client.HTTPException: no answer, or a part of one.
    """
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    try:
        with OPENER.open(request, timeout=seconds) as reply:
            raw = _whole(reply)
    except urllib.error.HTTPError as error:
        with error:
            text = error.read(REFUSAL).decode(errors="replace").strip()
        if 300 <= error.code < 400:
            text = f"ask {error.headers.get('Location')} instead; that is not done by itself"
        raise Refused(error.code, text) from None
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its answer is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"its answer is no JSON object but a {type(content).__name__}")
    return content


def _whole(reply) -> bytes:
    pieces, size = [], 0
    while piece := reply.read(PIECE):
        pieces.append(piece)
        size += len(piece)
        if size > LARGEST:
            raise ValueError(f"its answer is larger than {LARGEST} bytes")
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
