"""The answers of another model as text, from any OpenAI-compatible API: data for an sft stage.

A prompt's conversation goes to ``/v1/chat/completions``, with the tools and the word on thinking
that the student's template would be given (``chat_template_kwargs``, which vLLM heeds), or, where
the student has no chat template, its text as it stands to ``/v1/completions``. A finished answer
is logged and not paid for twice. Texts have no log-probs under the student's tokens, so nothing is
scored. Left out: environments (an answer is one turn), thinking that the API returns apart from
the content: it is refused.

    opdctl stage sft --student DIR 'sources={teacher: {model: "http://host:8000"}}'
"""

from __future__ import annotations

from contextlib import closing

from opdctl import draws
from opdctl.errors import StageFailed, UsageError
from opdctl.models.chat.messages import question
from opdctl.protocols import Teacher
from opdctl.remote.endpoint import opened, reading
from opdctl.types import Prompt


class Api(Teacher):
    """Texts of a model behind an OpenAI-compatible API; no scores."""

    revision = 1
    provides = ("teacher.text",)

    def __init__(self, ctx, student, name: str, reference: str) -> None:
        """Ask what is served.

        Raises:
            StageFailed: it does not answer.
            UsageError: it does not serve the model that is named.
        """
        self.ctx, self.reference = ctx, reference
        self.who = f"teacher {name} ({reference})"
        self.endpoint, served = opened(self.who, reference, ctx.runtime, ctx.check)
        self.served = served["id"]
        self.student, self.chat = student, bool(student.tokenizer.chat_template)

    def answer(self, prompts: list[Prompt], keys: list[int], sampling) -> list[tuple[str, bool]]:
        """Return one ``(answer, whether it was cut at the limit)`` for each prompt and key.

        Args:
            keys: 64 bits each; the seeds, as far as the API heeds them.

        Raises:
            StageFailed: it failed, or gave no answer; what was answered before is kept.
            UsageError: a prompt spells a control token, which a server would read as one.
        """
        how = (self.reference, sampling.temperature, sampling.max_tokens)
        questions = list(map(self._body, prompts))
        names = [
            f"answer {draws.key(*how, a, k):016x}" for a, k in zip(questions, keys, strict=True)
        ]
        logged = {i: self._recall(name) for i, name in enumerate(names)}
        answers = {i: answer for i, answer in logged.items() if answer is not None}
        todo = [i for i in logged if i not in answers]
        path = "/v1/chat/completions" if self.chat else "/v1/completions"
        bodies = [self._question(questions[i], keys[i], sampling) for i in todo]
        with closing(self.endpoint.each(path, bodies, self.ctx.check)) as replies:
            for at, reply in replies:
                with reading(self.who, "OpenAI's"):
                    answers[todo[at]] = self._read(reply)
                self._log(names[todo[at]], *answers[todo[at]])
        return [answers[i] for i in range(len(prompts))]

    def _body(self, prompt: Prompt) -> dict:
        turns, guarded = self.student.guarded(question(self.student.turns(prompt)), prompt)
        if token := self.student.control.spelled([*turns, *guarded.tools]):
            raise UsageError(
                f"data.{prompt.domain}: {self.who} is sent text and may read {token!r} in "
                f"{prompt.text[:60]!r} as a control token, which is text for the student",
                "leave such rows out, or a teacher whose weights are read here: it is shown ids",
            )
        if not self.chat:
            return {"prompt": prompt.text}
        body: dict = {"messages": [dict(m) for m in question(self.student.turns(prompt))]}
        if prompt.tools:
            body["tools"] = list(prompt.tools)
        if prompt.enable_thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": prompt.enable_thinking}
        return body

    def _question(self, prompt: dict, key: int, sampling) -> dict:
        return {
            "model": self.served,
            **prompt,
            "temperature": sampling.temperature,
            "top_p": 1.0,
            "max_tokens": sampling.max_tokens,
            "seed": key >> 33,  # 31 bits: some APIs take no more
        }

    def _read(self, reply: dict) -> tuple[str, bool]:
        (choice, *_) = reply.get("choices") or [{}]
        message = choice.get("message") or {}
        text = message.get("content") if self.chat else choice.get("text")
        if message.get("reasoning") or message.get("reasoning_content"):
            raise StageFailed(
                f"{self.who} gave its thinking apart from the answer, which would lose it",
                "start it without --reasoning-parser",
            )
        reason = choice.get("finish_reason")
        if text is None or reason not in ("stop", "length"):
            raise StageFailed(
                f"{self.who} gave no answer: it ended by {reason!r}",
                "an answer ends by 'stop' or 'length'; filters and tools are not supported",
            )
        if not isinstance(text, str):
            raise TypeError(f"a text is a {type(text).__name__}")
        return text, reason == "length"

    def _recall(self, name: str) -> tuple[str, bool] | None:
        logged = self.ctx.wal.get(name)
        if not logged:
            return None
        return logged[0]["text"].tobytes().decode(), bool(logged[0]["cut"])

    def _log(self, name: str, text: str, cut: bool) -> None:
        import numpy as np

        letters = np.frombuffer(text.encode(), np.uint8)
        self.ctx.wal.put(name, {"text": letters, "cut": np.array(cut)})
