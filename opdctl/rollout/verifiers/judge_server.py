"""A model behind an OpenAI-compatible server judges, over ``/chat/completions``: text in, text out.

A request that fails is tried again with growing pauses; a server that
does not answer ends the stage, with its name: no answer of it is taken for wrong. What a server
writes need not be the same twice, so a resumed stage may get other verdicts.
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
from opdctl.rollout.verifiers._judging import JudgeKeys, Judging, problems


class JudgeServer(Judging):
    """A model behind an OpenAI-compatible server says whether an answer is right."""

    revision = 1

    @dataclass(kw_only=True)
    class Config(JudgeKeys):
        """Keys of a judge behind a server."""

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
        """What the schema cannot see."""
        found = problems(config)
        if not config.url.startswith(("http://", "https://")):
            found.append(
                Problem("url", f"{config.url!r} is no http address", "http://HOST:PORT/v1")
            )
        return found

    @staticmethod
    def reach(config, domain: str, check) -> None:
        """Ask which models are served.

        Args:
            check: called while waiting; may raise to stop.

        Raises:
            StageFailed: it does not answer.
            UsageError: it does not serve the one that is named.
        """
        who = f"the judge {config.name} of data.{domain} ({config.url})"
        endpoint = Endpoint(who, config.url, config.timeout, key=token(config))
        answer = endpoint.all("/models", [None], check)[0]
        with reading(who, "OpenAI's"):
            names = [m["id"] for m in answer.get("data") or []]
        if config.name not in names:
            what = f"{who} serves {', '.join(map(str, names)) or 'no model'}, and not {config.name}"
            hint = f"data.{domain}.verifier.judge_server.name={names[0] if names else 'NAME'}"
            raise UsageError(what, hint)

    def replies(self, asked):
        """Several at once.

        Raises:
            StageFailed: the server does not answer, or refuses.
            Interrupted: a stop was asked for.
        """
        pool, stopped = ThreadPoolExecutor(self.config.jobs), threading.Event()
        try:
            parts = [pool.submit(self._ask, question, stopped) for _, question in asked]
            waiting = set(parts)
            while waiting:
                self.ctx.check()
                done, waiting = wait(waiting, POLL, FIRST_EXCEPTION)
                for part in done:
                    part.result()
            return [part.result() for part in parts]
        finally:  # a request in hand is left behind: its answer is not waited for
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
                answer = exchange(url, body, token(config), config.timeout)
                return str(answer["choices"][0]["message"]["content"] or "")
            except Refused as error:
                what = str(error)
                if error.code not in (408, 429) and error.code < 500:
                    break  # it will refuse again
            except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
                what = f"{type(error).__name__}: {error}"
            if tried == config.tries or stopped.wait(min(0.25 * 2**tried, 10.0)):
                break
        raise StageFailed(
            f"the judge {config.name} of data.{self.domain} at {config.url}: {what} "
            f"(tried {tried} times)",
            "is it up? curl " + config.url.rstrip("/") + "/models",
        )


def token(config) -> str:
    """What its variable holds; empty for none."""
    return os.environ.get(config.token_env, "") if config.token_env else ""
