"""A teacher behind vLLM's OpenAI-compatible server: the exact token ids in, log-probs out.

    python -m vllm.entrypoints.openai.api_server --model DIR --port 8000
    opdctl stage opd --student DIR --teacher http://host:8000 ...

A server of several models wants the one meant: ``http://host:8000#NAME``. Its log-probs are those
at temperature 1 over all rows of its head, padded ones included. At the start its whole vocabulary
is compared with the student's, id by id, and a known sequence is scored. Left out: hidden rows and
the whole vocabulary (a reply would be megabytes a token), top-k, scoring at another temperature.
"""

from __future__ import annotations

import math

from opdctl.errors import StageFailed, UsageError
from opdctl.teachers._http import opened

CHUNK = 1024  # ids of the vocabulary in one question


class Server:
    """A frozen model behind vLLM's server; log-probs of the exact token ids."""

    revision = 1
    provides = ("teacher.logprobs",)
    stored = None  # it gives no hidden rows, so it needs no head

    def __init__(self, ctx, student, name: str, reference: str) -> None:
        """Compare its vocabulary with the student's and score a known sequence.

        Raises:
            StageFailed: it does not answer.
            UsageError: it has other tokens, or does not score.
        """
        self.ctx, self.student, self.parameters = ctx, student, 0
        runtime = ctx.runtime
        self.who = f"teacher {name} ({reference})"
        self.batch = runtime.server_batch
        self.endpoint, served = opened(self.who, reference, runtime)
        self.served, self.longest = served["id"], served.get("max_model_len")
        self._compare_tokens()
        self._probe()

    def score(self, requests, temperature: float, want, top: int = 16):
        """Log-probs of every target token, in the order of the requests.

        Raises:
            StageFailed: it died, hung, answered short, or for other tokens.
        """
        import torch

        from opdctl.core.scoring import Scores

        assert temperature == 1.0 and set(want) <= {"logprobs"}, "validate refuses the rest"
        for request in requests:
            if self.longest and len(request.ids) >= self.longest:
                raise StageFailed(
                    f"{self.who} reads at most {self.longest} tokens, and a rollout has "
                    f"{len(request.ids)}",
                    "start it with a larger --max-model-len, or a smaller sampling.max_tokens",
                )
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].ids))
        parts = [order[i : i + self.batch] for i in range(0, len(order), self.batch)]
        bodies = [self._question([list(requests[i].ids) for i in part]) for part in parts]
        answers = self.endpoint.all("/v1/completions", bodies, self.ctx.check)
        found: list[list[float]] = [[] for _ in requests]
        for part, answer in zip(parts, answers, strict=True):
            for i, row in zip(part, self._rows(answer, len(part)), strict=True):
                logprobs = self._logprobs(row, requests[i].ids)
                found[i] = [logprobs[t] for t in requests[i].targets]
        flat = [v for row in found for v in row]
        return Scores(torch.tensor(flat, dtype=self.student.wide, device=self.student.device))

    def _question(self, ids: list[list[int]]) -> dict:
        return {
            "model": self.served,
            "prompt": ids,
            "max_tokens": 1,  # what it writes is not looked at
            "temperature": 1.0,
            "prompt_logprobs": 0,
            "add_special_tokens": False,
        }

    def _rows(self, answer: dict, count: int) -> list[list]:
        """``prompt_logprobs`` of each sequence, in their order."""
        choices = sorted(answer.get("choices") or [], key=lambda c: c.get("index", 0))
        if len(choices) != count:
            raise StageFailed(f"{self.who} answered {len(choices)} of {count} sequences")
        rows = [choice.get("prompt_logprobs") for choice in choices]
        if any(row is None for row in rows):
            raise StageFailed(
                f"{self.who} gives no prompt_logprobs: it is not vLLM's server",
                "serve it with vLLM; texts of any API can be used in an sft stage: sources.teacher",
            )
        return rows

    def _logprobs(self, row: list, ids) -> list[float]:
        """One per id; that of the first, which nothing predicts, is NaN, and so is a null."""
        if len(row) != len(ids):
            raise StageFailed(f"{self.who} scored {len(row)} of the {len(ids)} tokens it was sent")
        found = [math.nan]
        for place, (token, entry) in enumerate(zip(ids, row, strict=True)):
            if place == 0:
                continue
            if str(token) not in (entry or {}):
                raise StageFailed(
                    f"{self.who} was sent id {token} at place {place} and answered for "
                    f"{', '.join(entry or {}) or 'nothing'}"
                )
            value = entry[str(token)].get("logprob")
            found.append(math.nan if value is None else float(value))
        return found

    def _compare_tokens(self) -> None:
        """Every id the student has must be the same text there.

        Raises:
            UsageError: one is not; says which.
        """
        ids = list(range(self.student.valid_V))
        parts = [ids[i : i + CHUNK] for i in range(0, len(ids), CHUNK)]
        theirs = self._texts(parts)
        for part, text in zip(parts, theirs, strict=True):
            if text == self.student.tokenizer.decode(part):
                continue
            while len(part) > 1:  # the first half of it that differs
                half = part[: len(part) // 2]
                differs = self._texts([half])[0] != self.student.tokenizer.decode(half)
                part = half if differs else part[len(half) :]
            raise UsageError(
                f"{self.who} has another tokenizer than the student {self.student.name}: id "
                f"{part[0]} is {self._texts([part])[0]!r} there and "
                f"{self.student.tokenizer.decode(part)!r} here",
                "use a teacher of the same tokenizer, or its texts: an sft stage with "
                "sources.teacher",
            )

    def _texts(self, parts: list[list[int]]) -> list[str]:
        """What the server makes of ids; an id it does not have is an error, and reported as one."""
        bodies = [{"model": self.served, "tokens": part} for part in parts]
        return [a["prompt"] for a in self.endpoint.all("/detokenize", bodies, self.ctx.check)]

    def _probe(self) -> None:
        """Score a known sequence: the same ids come back, with log-probs.

        Raises:
            UsageError: what comes back are not log-probs.
        """
        last = self.student.valid_V - 1
        ids = [self.student.eos, 0, last // 2, last, self.student.eos]
        (answer,) = self.endpoint.all("/v1/completions", [self._question([ids])], self.ctx.check)
        (row,) = self._rows(answer, 1)
        logprobs = self._logprobs(row, ids)[1:]
        if not all(-math.inf < v < 1e-4 for v in logprobs):
            raise UsageError(
                f"{self.who} gives {logprobs} as log-probs of known tokens",
                "start it with --logprobs-mode raw_logprobs, and in a precision that is finite",
            )
