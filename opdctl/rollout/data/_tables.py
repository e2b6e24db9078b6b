"""The base of data in tables (files, Hugging Face): columns -> prompts, split, verifier fields."""

from __future__ import annotations

import hashlib
import json
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdctl.config.registry import member
from opdctl.config.schema import did_you_mean, key, with_role
from opdctl.config.shards import shards
from opdctl.errors import Problem, UsageError
from opdctl.models.chat.messages import (
    invalid_reason,
    last_answer,
    question,
    question_text,
    read_messages,
    read_tools,
    without_nulls,
)
from opdctl.rollout.data._domain_data import DomainData
from opdctl.rollout.data._nested import KeyOrder
from opdctl.rollout.data._spelling import lone_surrogate, spelled
from opdctl.rollout.extraction import Extract
from opdctl.rollout.split import DomainKeys, Split, iterate_distinct, question_id
from opdctl.types import Prompt

if TYPE_CHECKING:
    from opdctl.rollout.data._spool import Spool


@dataclass(kw_only=True)
class ColumnKeys(DomainKeys):
    """The keys of every tabular domain."""

    prompt_column: str = key("prompt", "column of the question")
    answer_column: str = key("answer", "column of the reference answer; empty: there is none")
    reference: Extract = key(
        Extract(),
        "what of the answer column is the reference answer; sft learns all of the column",
        neutral=True,
    )
    verifier: dict = key({"exact": {}}, "what passes an answer", family="verifiers")
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
    stream: bool = key(
        False,
        "keep prompts on disk and read them when needed: for large sets; the order is the same",
        role="operational",
    )

    def common_problems(self) -> list[Problem]:
        """Return what the schema cannot check of the keys that all tables share."""
        problems = super().common_problems() + self.reference.problems("reference")
        if self.reference.chosen and not (self.answer_column or self.messages_column):
            message = "there is no answer column that it could be a part of"
            problems.append(Problem("reference", message, "name the answer_column"))
        return problems


class TableData(DomainData):
    """Prompts from the rows of a table, which a subclass reads.

    Attributes:
        counts: by side: ``rows`` read, prompts ``kept``, and the ``empty`` and ``repeated`` ones
            that were left out.
    """

    def __init__(self, config, domain: str, seed: int) -> None:
        self.config, self.domain = config, domain
        self.counts: dict[str, Counter] = {}
        ((name, self.keys),) = config.verifier.items()
        self.verifier = member("verifiers", name)

    @abstractmethod
    def rows(self, split: Split) -> Iterator[dict]:
        """Yield the rows of the table."""

    def prompts(self, split: Split) -> list[Prompt]:
        """Return the distinct prompts of one side of the split.

        Raises:
            UsageError: a column is missing, or a value is no text; says in which row.
        """
        counts = self.counts[split] = Counter()
        limit = self.config.limit
        prompts = list(iterate_distinct(self._read(split), split, self.config, limit, counts))
        counts["kept"] = len(prompts)
        return prompts

    def stored(self, split: Split, cache: Path) -> Spool:
        """Return the same prompts on disk under ``cache``, written once in one pass over the rows.

        Raises:
            UsageError: as ``prompts``; or a row cannot be kept as JSON.
        """
        from opdctl.rollout.data._spool import Spool, write

        name = (
            self.revision,
            self.domain,
            split,
            with_role(self.config, "semantic"),
            self.version(),
        )
        code = hashlib.blake2b(json.dumps(name).encode(), digest_size=8).hexdigest()
        folder = cache / f"{self.domain}-{split}-{code}"
        if not folder.is_dir():
            counts = self.counts[split] = Counter()
            rows = iterate_distinct(
                self._read(split), split, self.config, self.config.limit, counts
            )
            try:
                write(folder, rows, counts)
            except TypeError as error:  # a date or bytes, in a column that a verifier reads
                message = f"data.{self.domain}.stream: a row cannot be kept as JSON: {error}"
                raise UsageError(message, "stream: false, or write that column as text") from None
        spool = Spool(folder)
        self.counts[split] = Counter(spool.counts)
        return spool

    def version(self) -> list:
        """Return name, size and time of change of each file: they change when the rows may have."""
        path = Path(self.config.path)
        files = sorted(path.rglob("*")) if path.is_dir() else shards(self.config.path)
        stats = [(os.path.relpath(f, path.parent), f.stat()) for f in files]
        return [(name, s.st_size, s.st_mtime_ns) for name, s in stats]

    def _read(self, split: Split) -> Iterator[Prompt]:
        config = self.config
        columns = ((config.messages_column, read_messages), (config.tools_column, read_tools))
        nested = [(name, read, KeyOrder()) for name, read in columns if name]
        for number, row in enumerate(self.rows(split), 1):
            self.counts[split]["rows"] = number
            for name, read, order in nested:
                if name in row:
                    row = {**row, name: order.sort(without_nulls(read(row[name])))}
            where = f"data.{self.domain}: {self.place(number)}"
            prompt = self._prompt(row, where)
            self._require_answer(prompt, row, where)
            yield prompt

    def place(self, number: int) -> str:
        """Return the place of the row that was read last, for messages: its file and row.

        Args:
            number: the count of rows so far.
        """
        return f"{self.config.path}, row {number}"

    def _require_answer(self, prompt: Prompt, row: dict, where: str) -> None:
        """Check that a verifier that compares with the answer column finds an answer there.

        Raises:
            UsageError: it is empty, which an empty response would equal, or lacks the part that
                ``reference`` names.
        """
        config, answer = self.config, prompt.answer.strip()
        column = f"{where}: column {config.answer_column!r}"
        told = row.get(config.answer_column) is not None  # else a conversation ends in a question
        if told and not answer and self.verifier.needs_answer(self.keys):
            raise UsageError(
                f"{column} is empty, and the verifier compares with it",
                'remove the row; without references: answer_column: "" and a verifier that '
                "needs none, as {regex: {pattern: .}}",
            )
        try:
            lacking = bool(answer) and config.reference.find(answer) is None
        except TimeoutError:
            lacking = True
        if lacking:
            message = f"{column} holds {answer[-60:]!r}, and no {config.reference} in it"
            raise UsageError(message, "remove the row, or change reference")

    def _prompt(self, row: dict, where: str) -> Prompt:
        config = self.config
        for name in filter(None, self._columns()):
            self._require_encodable(row.get(name), f"{where}: column {name!r}")
        if config.messages_column:
            return self._conversation(row, where)
        text = self._text(row, config.prompt_column, where)
        answer = self._text(row, config.answer_column, where)
        thought = self._text(row, config.thought_column, where)
        item = {"answer": answer, **self._item(row, where)}
        lead = config.thinking.lead(thought)
        return Prompt(question_id(self.domain, text), self.domain, text, answer, item, lead)

    def _columns(self) -> tuple[str, ...]:
        config = self.config
        if config.messages_column:
            return config.messages_column, config.tools_column, config.answer_column
        return config.prompt_column, config.answer_column, config.thought_column

    @staticmethod
    def _require_encodable(value: Any, where: str) -> None:
        part = lone_surrogate(value)
        if part:
            message = f"{where} holds half a surrogate pair, which is no text: {part}"
            raise UsageError(message, "remove the row, or write the whole character")

    def _item(self, row: dict, where: str) -> dict:
        """Return the fields of a row that the verifier reads."""
        try:
            item = self.verifier.item(self.keys, row)
            self._require_encodable(item, f"{where}: a column of the verifier")
            return item
        except KeyError as error:
            raise _missing(str(error.args[0]), row, where) from None
        except (ValueError, TypeError) as error:
            raise UsageError(f"{where}: {error}", "the domain's verifier reads it") from None

    def _conversation(self, row: dict, where: str) -> Prompt:
        """Build a prompt of several turns, whose answer is the answer column's or the last turn."""
        config = self.config
        for name in filter(None, (config.messages_column, config.tools_column)):
            if name not in row:
                raise _missing(name, row, where)
        messages = row[config.messages_column]
        reason = invalid_reason(messages)
        if reason:
            raise UsageError(
                f"{where}: column {config.messages_column!r}: {reason}",
                '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
            )
        messages = tuple(messages)
        tools = (row[config.tools_column] or ()) if config.tools_column else ()
        if not isinstance(tools, list | tuple) or not all(isinstance(t, dict) for t in tools):
            raise UsageError(
                f"{where}: column {config.tools_column!r} is no list of JSON schemas",
                '[{"type": "function", "function": {"name": "..."}}]',
            )
        named = config.answer_column not in ("", ColumnKeys.answer_column)
        if named and row.get(config.answer_column) is None:  # else the last turn may be it
            raise _missing(config.answer_column, row, where)
        text, reference = question_text(messages), row.get(config.answer_column)
        column = config.answer_column
        answer = last_answer(messages) if reference is None else self._text(row, column, where)
        calls = [m["tool_calls"] for m in question(messages) if m.get("tool_calls")]
        beside = json.dumps([calls, tools], default=str) if calls or tools else ""
        return Prompt(
            question_id(self.domain, text + beside),  # equal texts may differ in calls and tools
            self.domain,
            text,
            answer,
            {"answer": answer, **self._item(row, where)},
            messages=messages,
            tools=tuple(tools),
        )

    def _text(self, row: dict, column: str, where: str) -> str:
        if not column:
            return ""
        if column not in row:
            raise _missing(column, row, where)
        text = spelled(row[column])
        if text is None:
            raise UsageError(
                f"{where}: column {column!r} holds {row[column]!r:.60}, and text is read there",
                "remove the row, or name another column: prompt_column, answer_column",
            )
        return text


def _missing(column: str, row: dict, where: str) -> UsageError:
    names = [str(name) for name in row]
    near = did_you_mean(column, names, "")
    there = f"columns: {', '.join(names) or 'none'}"
    return UsageError(f"{where}: no column {column!r}", "; ".join(filter(None, (near, there))))
