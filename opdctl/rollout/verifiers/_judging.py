"""What judges share: the question that they are asked, and how their verdict is read."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.errors import Problem
from opdctl.types import Prompt

FIELD = re.compile(r"\{(prompt|answer|response)\}")
QUESTION = (
    "Question:\n{prompt}\n\nReference answer:\n{answer}\n\nResponse:\n{response}\n\n"
    "Does the response answer the question as the reference answer does? Say yes or no."
)


@dataclass(kw_only=True)
class JudgeKeys:
    """Keys of every judge."""

    template: str = key(QUESTION, "what it is asked, with {prompt}, {answer} and {response}")
    verdict: str = key(r"(?i)\b(yes|no)\b", "pattern of its verdict: the last match, its group")
    accept: str = key("yes", "the verdict that passes an answer, whatever its case")


def problems(config: JudgeKeys) -> list[Problem]:
    """What the schema cannot see."""
    found = []
    if "{response}" not in config.template:
        found.append(Problem("template", "the judge would not see the response", "{response}"))
    try:
        groups = re.compile(config.verdict).groups
    except re.error as error:
        return [*found, Problem("verdict", f"not a regular expression: {error}", "quote it")]
    if groups != 1:
        found.append(Problem("verdict", f"{groups} groups, and one is read", r"\b(yes|no)\b"))
    return found


class Judging(ABC):
    """Asks a model whether an answer is right. A response may talk to its judge: look at some."""

    problems = staticmethod(problems)

    def __init__(self, config, ctx, domain: str) -> None:
        self.config, self.ctx, self.domain = config, ctx, domain

    @staticmethod
    def needs_answer(config) -> bool:
        """Whether it is shown a reference answer."""
        return "{answer}" in config.template

    @abstractmethod
    def replies(self, asked: list[tuple[Prompt, str]]) -> list[str | Exception]:
        """What the judge writes of each (prompt, question), or what went wrong with it."""

    def score(self, asked: list[tuple[Prompt, str]]) -> list[float | Exception]:
        """A verdict for each (prompt, answer); a judge that gives none is an error."""
        questions = [(prompt, self.question(prompt, answer)) for prompt, answer in asked]
        return [
            reply if isinstance(reply, Exception) else self.read(reply)
            for reply in self.replies(questions)
        ]

    def question(self, prompt: Prompt, answer: str) -> str:
        """The template, filled in once: what stands in a response is not filled in again."""
        fields = {"prompt": prompt.text, "answer": prompt.answer, "response": answer}
        return FIELD.sub(lambda found: fields[found[1]], self.config.template)

    def read(self, reply: str) -> float | Exception:
        """1 if the last verdict is the one that passes."""
        found = re.findall(self.config.verdict, reply)
        if not found:
            return ValueError(f"the judge gave no verdict: {reply[-80:]!r}")
        return float(found[-1].casefold() == self.config.accept.casefold())
