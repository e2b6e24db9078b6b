"""A teacher behind vLLM's OpenAI-compatible server: the exact token ids in, log-probs out.

    python -m vllm.entrypoints.openai.api_server --model DIR --port 8000 --max-logprobs 32
    opdctl stage opd --student DIR --teacher http://host:8000 ...

A server of several models wants the one meant: ``http://host:8000#NAME``. Its log-probs are those
at temperature 1 over all rows of its head, padded ones included. At the start its whole vocabulary
is compared with the student's, id by id, and a known sequence is scored, with as many of the most
probable tokens as will be asked for. That sequence goes along with every question: a server whose
answer to it has changed serves other weights now, and nothing of that answer is used. Each answer
is logged as it comes, under what was asked and not where, so a resumed stage asks a server that was
started again for the rest.

Left out: hidden rows and the whole vocabulary (a reply would be megabytes a token); log-probs at
ids of the student's choice, which vLLM has for CUDA alone (``prompt_logprob_token_ids``, behind
``--enable-scale-out``); scoring at another temperature.
"""

from __future__ import annotations

import math
from contextlib import closing

from opdctl import draws
from opdctl.errors import StageFailed, UsageError
from opdctl.protocols import Teacher
from opdctl.remote.endpoint import opened, reading
from opdctl.scoring.asks import LOGPROBS, Asks
from opdctl.scoring.quantities import SERVED
from opdctl.types import ScoreRequest

CHUNK = 1024  # ids of the vocabulary in one question
NEVER = -9999.0  # what vLLM writes for minus infinity
RAW = "start it with --logprobs-mode raw_logprobs, and in a precision that is finite"
DRIFT = 0.05  # nats a token; vLLM in bfloat16 was .014 from transformers, on average
ROUNDED = 1e-4  # the log of 1 in a low precision may come out this far above 0


class Server(Teacher):
    """A frozen model behind vLLM's server; log-probs of the exact token ids, and its top k."""

    revision = 1
    keeps = True
    provides = SERVED
    stored = None  # it gives no hidden rows, so it needs no head

    def __init__(self, ctx, student, name: str, reference: str, asks: Asks = LOGPROBS) -> None:
        """Compare its vocabulary with the student's and score a known sequence.

        Args:
            asks: what it will be asked.

        Raises:
            StageFailed: it does not answer.
            UsageError: it has other tokens, does not score, or gives shorter lists.
        """
        self.ctx, self.student, self.name, self.parameters = ctx, student, name, 0
        runtime = ctx.runtime
        self.who = f"teacher {name} ({reference})"
        self.batch = runtime.server_batch
        elsewhere = f"stages.{ctx.name}.teachers.{name}.at=http://host:8000"
        self.endpoint, served = opened(self.who, reference, runtime, ctx.check, elsewhere)
        self.served, self.longest = served["id"], served.get("max_model_len")
        self._compare_tokens()
        last = student.valid_V - 1
        self.known = (student.eos, 0, last // 2, last, student.eos)
        self.known_logprobs = self._probe(self._list_size(asks))

    def _list_size(self, asks: Asks) -> int:
        """Return how many of the most probable tokens answer what is asked."""
        return min(asks.list_size, self.student.valid_V)

    def score(self, requests, asks, run):
        """Return scores of every target token, in the order of the requests.

        Raises:
            StageFailed: it died, hung, answered short, or for other tokens. What it answered
                before is logged.
        """
        import numpy as np
        import torch

        from opdctl.scoring.score import Scores

        assert run.temperature == 1.0
        assert {f"teacher.{name}" for name in asks.quantities} <= set(self.provides)
        for request in requests:
            if self.longest and len(request.ids) >= self.longest:
                raise StageFailed(
                    f"{self.who} reads at most {self.longest} tokens, and a rollout has "
                    f"{len(request.ids)}",
                    "start it with a larger --max-model-len, or a smaller sampling.max_tokens",
                )
        k = self._list_size(asks)
        keys = [f"teacher {self.name} {draws.key(k, r):016x}" for r in requests]
        by_key = dict(zip(keys, requests, strict=True))  # the same answer twice is asked for once
        answered = {key: logged[0] for key in by_key if (logged := self.ctx.wal.get(key))}
        todo = sorted((q for q in by_key if q not in answered), key=lambda q: len(by_key[q].ids))
        parts = [todo[i : i + self.batch] for i in range(0, len(todo), self.batch)]
        bodies = [
            self._question([*(list(by_key[q].ids) for q in part), list(self.known)], k)
            for part in parts
        ]
        with closing(self.endpoint.each("/v1/completions", bodies, self.ctx.check)) as answers:
            for at, answer in answers:
                with reading(self.who):
                    *rows, known = self._rows(answer, len(parts[at]) + 1)
                    self._require_same(known)
                    pairs = zip(parts[at], rows, strict=True)
                    read = {q: self._read(row, by_key[q], k) for q, row in pairs}
                answered |= read
                for q in read:
                    self._require_logprobs(answered[q]["logprobs"])
                    if np.isfinite(answered[q]["logprobs"]).all():
                        self.ctx.wal.put(q, answered[q])
        whole = {n: np.concatenate([answered[q][n] for q in keys]) for n in ("logprobs", "ids")}
        values_NJ = torch.from_numpy(whole["logprobs"]).to(
            self.student.device, self.student.logits_dtype
        )
        ids_NK = torch.from_numpy(whole["ids"]).to(self.student.device)
        scores = Scores({"logprobs": values_NJ[:, 0]})
        if k:
            scores.top_NK, scores.top_logprob_NK = ids_NK, values_NJ[:, 1:]
            scores.read_list(asks)
        return scores

    def _read(self, row: list, request, k: int) -> dict:
        """Return log-probs of the targets, [n, 1 + k], that of the target first, and the ids of
        the k most probable, [n, k], in descending order."""
        import numpy as np

        self._require_whole(row, request.ids)
        places = request.targets
        values, ids = np.full((len(places), 1 + k), np.nan), np.zeros((len(places), k), np.int64)
        for n, place in enumerate(places):
            target, entry = str(request.ids[place]), row[place]
            values[n, 0] = logprob(entry[target])
            # the target is there whether or not it is one of the most probable
            top = sorted((t for t in entry if t != target or len(entry) == k), key=rank(entry))[:k]
            if len(top) < k:
                raise StageFailed(
                    f"{self.who} listed {len(top)} of the {k} most probable tokens at place {place}"
                )
            ids[n] = [int(t) for t in top]
            values[n, 1:] = [logprob(entry[t]) for t in top]
        if k and ids.size and ids.max() >= self.student.valid_V:
            raise StageFailed(
                f"{self.who} has id {ids.max()} among its {k} most probable, and the tokenizer has "
                f"{self.student.valid_V} ids",
                "a row of its head that stands for no token: a smaller k, or a folder as teacher",
            )
        return {"logprobs": values, "ids": ids}

    def _require_logprobs(self, values_NJ) -> None:
        """Check that they can be log-probs; one that is NaN is told later, with its rollout.

        Raises:
            StageFailed: one is above 0, or stands for none.
        """
        wrong = values_NJ[(values_NJ <= NEVER) | (values_NJ > ROUNDED)]
        if wrong.size:
            raise StageFailed(f"{self.who} gave {wrong[0]} as a log-prob", RAW)

    def _question(self, ids: list[list[int]], k: int) -> dict:
        return {
            "model": self.served,
            "prompt": ids,
            "max_tokens": 1,  # what it writes is not looked at
            "temperature": 1.0,
            "prompt_logprobs": k,  # and the token that stands there
            "add_special_tokens": False,
        }

    def _rows(self, answer: dict, count: int) -> list[list]:
        """Return ``prompt_logprobs`` of each sequence, in their order."""
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

    def _require_whole(self, row: list, ids) -> None:
        """Check that there is an entry for each id but the first, which nothing predicts.

        Raises:
            StageFailed: fewer, or of other ids.
        """
        if len(row) != len(ids):
            raise StageFailed(f"{self.who} scored {len(row)} of the {len(ids)} tokens it was sent")
        for place, (token, entry) in enumerate(zip(ids, row, strict=True)):
            if place and str(token) not in (entry or {}):
                raise StageFailed(
                    f"{self.who} was sent id {token} at place {place} and answered for "
                    f"{', '.join(entry or {}) or 'nothing'}"
                )

    def _compare_tokens(self) -> None:
        """Check that every id of the student's is the same text there.

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
        """Return the server's texts of ids; an id it does not have is an error, and reported as
        one."""
        bodies = [{"model": self.served, "tokens": part} for part in parts]
        answers = self.endpoint.all("/detokenize", bodies, self.ctx.check)
        with reading(self.who):
            return [answer["prompt"] for answer in answers]

    def _probe(self, k: int) -> list[float]:
        """Score the known sequence: the same ids come back, with log-probs, and k at each place.

        Returns:
            The log-probs of its tokens but the first.

        Raises:
            UsageError: what comes back are not log-probs, or it lists fewer.
        """
        try:
            answer = self.endpoint.all(
                "/v1/completions", [self._question([list(self.known)], k)], self.ctx.check
            )
        except StageFailed as error:
            if k and "logprobs" in error.message:
                raise UsageError(
                    f"{self.who} does not list the {k} most probable tokens: {error.message}",
                    f"start it with --max-logprobs {k}, or ask for fewer: k in the objective",
                ) from None
            raise
        with reading(self.who):
            (row,) = self._rows(answer[0], 1)
            logprobs_NJ = self._read(row, ScoreRequest(self.known, 1), k)["logprobs"]
        possible = ((logprobs_NJ > NEVER) & (logprobs_NJ < ROUNDED)).all()
        if not possible or not logprobs_NJ[:, 0].any():  # four tokens by chance, each certain
            raise UsageError(
                f"{self.who} gives {logprobs_NJ[:, 0].tolist()} as log-probs of known tokens",
                RAW,
            )
        return logprobs_NJ[:, 0].tolist()

    def _require_same(self, row: list) -> None:
        """Check that the known sequence has the log-probs it had at the start.

        Raises:
            StageFailed: it has others: the server's weights have changed meanwhile.
        """
        self._require_whole(row, self.known)
        now = [logprob(entry[str(i)]) for i, entry in zip(self.known[1:], row[1:], strict=True)]
        apart = [abs(a - b) for a, b in zip(now, self.known_logprobs, strict=True)]
        if not sum(apart) <= DRIFT * len(apart):  # NaN too
            before, after = (
                " ".join(f"{value:.3f}" for value in values)
                for values in (self.known_logprobs, now)
            )
            raise StageFailed(
                f"{self.who} is not what it was when this attempt began: the log-probs of a known "
                f"sequence were {before} and are {after}",
                "serve the weights that it had; what it answered before is kept",
            )


def logprob(entry: dict) -> float:
    """Return the log-prob of one token; a null is NaN."""
    return math.nan if entry.get("logprob") is None else float(entry["logprob"])


def rank(entry: dict):
    """Return the order of an entry's tokens: the most probable first, of equals the smaller id."""
    return lambda token: (-logprob(entry[token]), int(token))
