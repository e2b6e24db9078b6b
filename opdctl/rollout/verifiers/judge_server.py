"""A model behind an OpenAI-compatible server judges, over ``/chat/completions``: text in, text out.

A request that fails is tried again with growing pauses. A server that does not answer ends the
stage, by name; no response is counted as wrong for that. A server may answer differently the next
time, so a resumed stage may get other verdicts.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from http.client import HTTPException

from opdctl.config.schema import REQUIRED, key
from opdctl.errors import Problem, StageFailed, UsageError
from opdctl.remote.endpoint import POLL, Endpoint, reading
from opdctl.remote.http import Refused, exchange
from opdctl.rollout.verifiers._judge import JudgeKeys, JudgeVerifier, problems


class JudgeServer(JudgeVerifier):
    """A model behind an OpenAI-compatible server says whether an answer is right."""

    revision = 1
    asks_server = True

    @dataclass(kw_only=True)
    class Config(JudgeKeys):
        """The keys of a judge behind a server."""

        url: str = key(REQUIRED, "up to /v1, as in http://localhost:8000/v1")
        name: str = key(REQUIRED, "the model's name on the server")
        token_env: str = key("", "environment variable with its API token; empty: none")
        temperature: float = key(0.0, "of the server's sampling", least=0.0)
        max_tokens: int = key(256, "longest verdict, in tokens", least=1)
        timeout: float = key(60.0, "seconds of one request", role="operational", least=0.1)
        tries: int = key(4, "requests before the stage fails", role="operational", least=1)
        jobs: int = key(16, "requests at once", role="operational", least=1)

    @staticmethod
    def problems(config) -> list[Problem]:
        """Return what the schema cannot check of the judge's keys."""
        wrong = problems(config)
        if not config.url.startswith(("http://", "https://")):
            wrong.append(
                Problem("url", f"{config.url!r} is no http address", "http://HOST:PORT/v1")
            )
        return wrong

    @staticmethod
    def require_served(config, domain: str, check) -> None:
        """Check that the server answers and serves the model.

        Args:
            check: called while waiting; may raise to stop.

        Raises:
            StageFailed: it does not answer.
            UsageError: it does not serve the model.
        """
        who = f"the judge {config.name} of data.{domain} ({config.url})"
        endpoint = Endpoint(who, config.url, config.timeout, key=api_token(config))
        answer = endpoint.all("/models", [None], check)[0]
        with reading(who, "OpenAI's"):
            names = [m["id"] for m in answer.get("data") or []]
        if config.name not in names:
            served = ", ".join(map(str, names)) or "no model"
            message = f"{who} serves {served}, and not {config.name}"
            hint = f"data.{domain}.verifier.judge_server.name={names[0] if names else 'NAME'}"
            raise UsageError(message, hint)

    def replies(self, questions):
        """Return the judge's texts; sends ``jobs`` requests at once.

        Raises:
            StageFailed: the server does not answer, or refuses.
            Interrupted: a stop was asked for.
        """
        pool, stopped = ThreadPoolExecutor(self.config.jobs), threading.Event()
        try:
            requests = [pool.submit(self._ask, question, stopped) for _, question in questions]
            waiting = set(requests)
            while waiting:
                self.ctx.check()
                done, waiting = wait(waiting, POLL, FIRST_EXCEPTION)
                for request in done:
                    request.result()
            return [request.result() for request in requests]
        finally:  # requests in flight are abandoned
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, question: str, stopped: threading.Event) -> str:
        config = self.config
        body = {
            "model": config.name,
            "messages": [{"role": "user", "content": question}],
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
        }
        url = f"{config.url.rstrip('/')}/chat/completions"
        for tried in range(1, config.tries + 1):
            try:
                answer = exchange(url, body, api_token(config), config.timeout)
                return str(answer["choices"][0]["message"]["content"] or "")
            except Refused as error:
                cause = str(error)
                if error.code not in (408, 429) and error.code < 500:
                    break  # it will refuse again
            except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
                cause = f"{type(error).__name__}: {error}"
            if tried == config.tries or stopped.wait(min(0.25 * 2**tried, 10.0)):
                break
        raise StageFailed(
            f"the judge {config.name} of data.{self.domain} at {config.url}: {cause} "
            f"(tried {tried} times)",
            "is it up? curl " + config.url.rstrip("/") + "/models",
        )


def api_token(config) -> str:
    """Return the API token from its environment variable; "" without one."""
    return os.environ.get(config.token_env, "") if config.token_env else ""
