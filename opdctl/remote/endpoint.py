"""Send requests to a model behind HTTP, with a deadline, retries and a bound on how many at once.

The deadline covers one request with all its retries. A request that is refused, cut off, or
answered by 429 or 5xx is sent again while time is left; any other answer that is not 200, a
redirect too, is an error at once. A key for the server is read from the environment and stored
nowhere, even if the server repeats it.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager

from opdctl.config import references
from opdctl.config.secrets import key_of, masked, remember
from opdctl.errors import OpdctlError, StageFailed, UsageError
from opdctl.remote.http import Refused, exchange
from opdctl.types import WAITING

HINTS = {
    401: "OPDCTL_API_KEY=KEY in the environment",
    403: "OPDCTL_API_KEY=KEY in the environment",
    404: "is it an OpenAI-compatible server, and the address without a path?",
}
AGAIN = (408, 429, 500, 502, 503, 504)
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0  # seconds between tries, doubled each time
POLL = 0.2  # seconds between looks at the stop flag
FIRST_LINE, SAY_EVERY = 1.0, 10.0  # seconds until a failure is said, and between lines
START = "start the server again, or raise runtime.server_timeout"


class NoAnswer(StageFailed):
    """No answer came in time. ``elsewhere`` is the key that gives another address; may be empty."""

    def __init__(self, message: str, elsewhere: str = "") -> None:
        self.elsewhere = elsewhere
        moved = f"; elsewhere: opdctl resume DIR {elsewhere}" if elsewhere else ""
        super().__init__(message, f"{START}; what was finished is kept{moved}")


class Endpoint:
    """One server, with the name that messages use for it.

    Args:
        who: the name, such as ``teacher math (http://host:8000)``.
        base: the address without a path.
        timeout: seconds that a request may take with all its retries.
        most: requests at once.
        elsewhere: the key of the recipe that sets another address.
        key: a secret; None takes that of the environment, see ``config/secrets.py``.

    Attributes:
        again: the codes after which a request is sent again.
        trouble: the reason why the newest try failed; empty after one that did not.
    """

    def __init__(
        self, who: str, base: str, timeout: float, most: int = 1, elsewhere: str = "", key=None
    ) -> None:
        self.who, self.base, self.timeout, self.most = who, base.rstrip("/"), timeout, most
        self.again: tuple[int, ...] = AGAIN
        self.trouble, self.elsewhere = "", elsewhere
        self.key = key_of(self.base) if key is None else key
        remember(self.key)

    def ask(self, path: str, body: dict | None = None, stopped=None) -> dict:
        """Send a GET, or with a body a POST, and return the JSON answer.

        Args:
            stopped: an event; once it is set no request is sent again.

        Raises:
            StageFailed: no answer in time, or a refusal; the message names the server.
        """
        end, pause, tries = time.monotonic() + self.timeout, FIRST_PAUSE, 0
        while True:
            tries += 1
            try:
                left = max(0.01, end - time.monotonic())
                answer = exchange(self.base + path, body, self.key, left)
                self.trouble = ""
                return answer
            except Refused as error:
                why = str(error)
                if error.code not in self.again:
                    raise StageFailed(
                        f"{self.who}: {path}: {why}", HINTS.get(error.code, "")
                    ) from None
            except ValueError as error:
                raise StageFailed(f"{self.who}: {path}: {error}") from None
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                late = isinstance(reason, TimeoutError)
                why = "it did not answer" if late else masked(str(reason))
            self.trouble = why
            pause = min(pause, end - time.monotonic() - FIRST_PAUSE)  # a last try has some time
            if pause <= 0 or (stopped and stopped.wait(pause)):
                request = f"{path} within {self.timeout:g} s (tries: {tries})"
                raise NoAnswer(f"{self.who}: no answer to {request}: {why}", self.elsewhere)
            if not stopped:
                time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def each(
        self, path: str, bodies: Sequence[dict | None], check: Callable[[], None], confirm=None
    ) -> Generator[tuple[int, dict], None, None]:
        """Send several requests at once, and yield (index, answer) as the answers come.

        Args:
            check: called several times a second while waiting; may raise to stop.
            confirm: called with the event ``stopped`` of ``ask`` after each answer, before it is
                yielded; may raise to refuse it.

        Raises:
            StageFailed: one of them failed. Earlier answers have been yielded, and the requests
                still waiting are dropped.
        """
        stopped = threading.Event()
        pool = ThreadPoolExecutor(self.most)
        begun, last_line_at = time.monotonic(), 0.0

        def confirmed(body):
            answer = self.ask(path, body, stopped)
            if confirm:
                confirm(stopped)
            return answer

        try:
            index_of = {pool.submit(confirmed, b): i for i, b in enumerate(bodies)}
            waiting = set(index_of)
            while waiting:
                check()
                done, waiting = wait(waiting, POLL, FIRST_COMPLETED)
                failed = [future for future in done if future.exception()]
                for future in done.difference(failed):
                    yield index_of[future], future.result()
                for future in failed:
                    future.result()
                now = time.monotonic()
                begun = now if done else begun
                soon = FIRST_LINE if self.trouble and last_line_at < begun else SAY_EVERY
                if waiting and now - max(begun, last_line_at) > soon:
                    last_line_at, why = now, f": {self.trouble}" if self.trouble else ""
                    print(
                        f"{self.who}{WAITING}{path} since {now - begun:.0f} s "
                        f"(runtime.server_timeout {self.timeout:g} s){why}",
                        flush=True,
                    )
            if last_line_at:
                print(f"{self.who} answered", flush=True)
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def all(
        self, path: str, bodies: Sequence[dict | None], check: Callable[[], None]
    ) -> list[dict]:
        """Send several requests at once, as ``each``, and return the answers in their order."""
        answers = dict(self.each(path, bodies, check))
        return [answers[i] for i in range(len(bodies))]


@contextmanager
def reading(who: str, whose: str = "vLLM's") -> Iterator[None]:
    """Turn an error in reading an answer into one that names the server.

    Args:
        who: the name of the server.
        whose: the owner of the expected form, for the message.

    Raises:
        StageFailed: a part of the answer is missing, or has another type.
    """
    try:
        yield
    except OpdctlError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StageFailed(
            f"{who} answered in a form that is not {whose}: "
            f"{type(error).__name__}: {masked(str(error))}"
        ) from None


def opened(
    who: str, reference: str, runtime, check: Callable[[], None], elsewhere: str = ""
) -> tuple[Endpoint, dict]:
    """Ask a server for its models, and return its endpoint and its entry of the named model.

    Args:
        who: the name of the server in messages.
        reference: its address, with ``#NAME`` where it serves several models.
        check: called while waiting for it; may raise to stop.
        elsewhere: the key of the recipe that sets another address.

    Raises:
        StageFailed: it does not answer.
        UsageError: it does not serve the model; the message names those it does serve.
    """
    base, name = references.address(reference)
    endpoint = Endpoint(who, base, runtime.server_timeout, runtime.server_requests, elsewhere)
    answer = endpoint.all("/v1/models", [None], check)[0]
    with reading(who, "OpenAI's"):
        models = answer.get("data") or []
        names = [m["id"] for m in models]
        chosen = [m for m in models if m["id"] == name or (not name and len(models) == 1)]
    if not chosen:
        shown = [masked(str(served)) for served in names]
        raise UsageError(
            f"{who} serves {', '.join(shown) or 'no model'}"
            + (f", and not {name}" if name else ": which one is meant?"),
            f"{base}#{shown[0] if shown else 'NAME'}",
        )
    return endpoint, chosen[0]
