"""The base of verifiers that ask a model: the question, and the reading of its verdict."""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.errors import Problem
from opdctl.rollout.verifiers._verifier import Verifier
from opdctl.types import Prompt

FIELD = re.compile(r"\{(prompt|answer|response)\}")
QUESTION = (
    "Question:\n{prompt}\n\nReference answer:\n{answer}\n\nResponse:\n{response}\n\n"
    "Does the response answer the question as the reference answer does? Say yes or no."
)


@dataclass(kw_only=True)
class JudgeKeys:
    """The keys of every judge."""

    template: str = key(QUESTION, "what it is asked, with {prompt}, {answer} and {response}")
    verdict: str = key(r"(?i)\b(yes|no)\b", "pattern of its verdict: the last match, its group")
    accept: str = key("yes", "the verdict that passes an answer, whatever its case")


def problems(config: JudgeKeys) -> list[Problem]:
    """Return what the schema cannot check of a judge's keys."""
    wrong = []
    if "{response}" not in config.template:
        wrong.append(Problem("template", "the judge would not see the response", "{response}"))
    try:
        groups = re.compile(config.verdict).groups
    except re.error as error:
        return [*wrong, Problem("verdict", f"not a regular expression: {error}", "quote it")]
    if groups != 1:
        wrong.append(Problem("verdict", f"{groups} groups, and one is read", r"\b(yes|no)\b"))
    return wrong


class JudgeVerifier(Verifier):
    """A verifier that asks a model. A response may address its judge: read some of them."""

    problems = staticmethod(problems)

    @staticmethod
    def needs_answer(config) -> bool:
        """Return True if the judge is shown a reference answer."""
        return "{answer}" in config.template

    @abstractmethod
    def replies(self, questions: list[tuple[Prompt, str]]) -> list[str | Exception]:
        """Return the judge's text for each (prompt, question), or the error in its place."""

    def score(self, answers: list[tuple[Prompt, str]]) -> list[float | Exception]:
        """Return a verdict for each (prompt, answer); an error if the judge gives none."""
        questions = [(prompt, self.question(prompt, answer)) for prompt, answer in answers]
        return [
            reply if isinstance(reply, Exception) else self.read(reply)
            for reply in self.replies(questions)
        ]

    def question(self, prompt: Prompt, answer: str) -> str:
        """Fill in the template, once: a field inside a response is not filled in again."""
        fields = {"prompt": prompt.text, "answer": prompt.answer, "response": answer}
        return FIELD.sub(lambda match: fields[match[1]], self.config.template)

    def read(self, reply: str) -> float | Exception:
        """Return 1 if the last verdict of a reply is the one that passes, else 0."""
        verdicts = re.findall(self.config.verdict, reply)
        if not verdicts:
            return ValueError(f"the judge gave no verdict: {reply[-80:]!r}")
        return float(verdicts[-1].casefold() == self.config.accept.casefold())
