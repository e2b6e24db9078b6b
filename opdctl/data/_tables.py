"""What file and Hugging Face data share: columns -> prompts, split and verifier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

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

    def score(self, prompt: Prompt, text: str) -> float:
        """1 if an answer, without its thinking, passes the domain's verifier, else 0."""
        _, text = self.config.thinking.split(text)
        if self.config.verifier == "exact":
            return float(text.strip() == prompt.answer.strip())
        from math_verify import parse, verify

        return float(verify(parse(prompt.answer), parse(text)))
