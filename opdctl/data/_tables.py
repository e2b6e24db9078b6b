"""What file and Hugging Face data share: columns -> prompts, split and verifier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from opdctl.chat.messages import answer_of, complaint, text_of
from opdctl.core.questions import DomainKeys, Split, digest, distinct
from opdctl.errors import UsageError
from opdctl.schema import did_you_mean, key
from opdctl.types import Prompt


@dataclass(kw_only=True)
class ColumnKeys(DomainKeys):
    """Keys of every tabular domain."""

    prompt_column: str = key("prompt", "column of the question")
    answer_column: str = key("answer", "column of the reference answer")
    verifier: Literal["exact", "math"] = key("exact", "exact: equal text; math: math-verify")
    thought_column: str = key(
        "", "column of the thinking that leads to the answer; empty: none", neutral=True
    )
    messages_column: str = key(
        "",
        "column of conversations, in place of prompt_column; where the assistant speaks last, sft "
        "learns its turns and the last one is the answer",
        neutral=True,
    )
    tools_column: str = key(
        "", "column of what the chat template is told of tools; empty: none", neutral=True
    )
    eval_share: float = key(0.1, "share of questions held out", least=0, most=1)
    limit: int = key(0, "distinct prompts kept of each side; 0 is all", least=0)


class TableData(ABC):
    """Prompts from rows; a subclass says where the rows come from."""

    def __init__(self, config, domain: str, seed: int) -> None:
        self.config, self.domain = config, domain

    @abstractmethod
    def rows(self, split: Split) -> Iterator[dict]:
        """Rows of the table."""

    def prompts(self, split: Split) -> list[Prompt]:
        """Distinct prompts of one side of the split.

        Raises:
            UsageError: a column is missing, or a value is no text; says in which row.
        """
        prompts = (self._prompt(row, number) for number, row in enumerate(self.rows(split), 1))
        return distinct(prompts, split, self.config, self.config.limit)

    def _prompt(self, row: dict, number: int) -> Prompt:
        config = self.config
        where = f"data.{self.domain}: {config.path}, row {number}"
        if config.messages_column:
            return self._conversation(row, where)
        for name in filter(
            None, (config.prompt_column, config.answer_column, config.thought_column)
        ):
            if name not in row:
                raise UsageError(
                    f"{where}: no column {name!r}", did_you_mean(name, map(str, row), "columns:")
                )
            if not isinstance(row[name], str | int | float):
                raise UsageError(
                    f"{where}: column {name!r} holds {row[name]!r:.60}, and text is read there",
                    "remove the row, or name another column: prompt_column, answer_column",
                )
        text, answer = str(row[config.prompt_column]), str(row[config.answer_column])
        lead = config.thinking.lead(str(row.get(config.thought_column) or ""))
        item = {"answer": answer}
        return Prompt(digest(self.domain, text), self.domain, text, answer, item, lead)

    def _conversation(self, row: dict, where: str) -> Prompt:
        """A prompt of several turns; its answer is the answer column's, or the last turn."""
        config = self.config
        for name in filter(None, (config.messages_column, config.tools_column)):
            if name not in row:
                near = did_you_mean(name, map(str, row), "columns:")
                raise UsageError(f"{where}: no column {name!r}", near)
        messages = row[config.messages_column]
        wrong = complaint(messages)
        if wrong:
            raise UsageError(
                f"{where}: column {config.messages_column!r}: {wrong}",
                '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
            )
        # a table gives every message the fields that any of them has
        messages = tuple({k: v for k, v in m.items() if v is not None} for m in messages)
        tools = (row[config.tools_column] or ()) if config.tools_column else ()
        if not isinstance(tools, list | tuple) or not all(isinstance(t, dict) for t in tools):
            raise UsageError(
                f"{where}: column {config.tools_column!r} is no list of JSON schemas",
                '[{"type": "function", "function": {"name": "..."}}]',
            )
        text, given = text_of(messages), row.get(config.answer_column)
        answer = answer_of(messages) if given is None else str(given)
        return Prompt(
            digest(self.domain, text),
            self.domain,
            text,
            answer,
            {"answer": answer},
            messages=messages,
            tools=tuple(tools),
        )

    def score(self, prompt: Prompt, text: str) -> float:
        """1 if an answer, without its thinking, passes the domain's verifier, else 0."""
        _, text = self.config.thinking.split(text)
        if self.config.verifier == "exact":
            return float(text.strip() == prompt.answer.strip())
        from math_verify import parse, verify

        return float(verify(parse(prompt.answer), parse(text)))
