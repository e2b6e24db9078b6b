"""Procedural tasks with their own verifiers: reasoning-gym's generators and ``score_answer``.

Its questions carry long boilerplate; for a model of 0.1 M parameters the prompt is a template over
the item's metadata. The scorer stays reasoning-gym's, and only a score of 1 counts, since it gives
partial credit to near misses. No scorer may execute an answer: some would pass it to eval, which is
replaced by a reader of literals, and some to sympy's parser, which gets arithmetic only.
"""

from __future__ import annotations

import ast
import json
import re
import string
import sys
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal

from opdctl.config.schema import REQUIRED, key
from opdctl.errors import Problem, UsageError
from opdctl.models.chat.thinking import Trace
from opdctl.rollout.data._domain_data import DomainData
from opdctl.rollout.split import DomainKeys, Split, distinct_prompts, question_id
from opdctl.types import Prompt

ARITHMETIC = re.compile(r"[\d\s.+*/()-]*")
OF_ARITHMETIC = ("countdown", "puzzle24")  # their scorers parse an answer with sympy


class ReasoningGym(DomainData):
    """reasoning-gym tasks: its generators, its verifiers, compact prompts."""

    revision = 1
    procedural = True

    @dataclass(kw_only=True)
    class Config(DomainKeys):
        """The keys of a reasoning-gym domain."""

        task: str = key(REQUIRED, "name of the reasoning-gym data set, such as gcd")
        config: dict[str, Any] = key({}, "its own settings, such as max_value")
        prompt: str = key("", "template over metadata, as in 'gcd {numbers}='; empty: question")
        answer: Literal["text", "list"] = key("text", "list: a JSON list, as the separator says")
        separator: str = key(" ", "between the items of a list, in prompt and answer")
        lowercase: bool = key(False, "prompt and answer in lower case")
        items: int = key(4000, "items generated before the split", least=1)
        eval_share: float = key(0.25, "share of questions held out", least=0, most=1)
        trace: Trace = key(Trace(), "the thought of a demonstration", neutral=True)
        call: str = key(
            "", "template of the call a demonstration makes first; empty: none", neutral=True
        )

    def __init__(self, config: Config, domain: str, seed: int) -> None:
        import reasoning_gym

        self.config, self.domain = config, domain
        self.entries: dict[int, dict] = {}  # by index: what the scorer needs, made when asked for
        try:
            self.dataset = reasoning_gym.create_dataset(
                config.task, size=config.items, seed=seed, **config.config
            )
        except Exception as error:  # its settings are the recipe's: any of them may be wrong
            raise UsageError(
                f"data.{domain}.task: reasoning-gym refuses {config.task!r:.80}: {error!s:.300}",
                "its names and settings stand in reasoning-gym's gallery",
            ) from error
        self.arithmetic = make_scorer_safe(config.task, self.dataset, f"data.{domain}.task")

    @staticmethod
    def problems(config) -> list[Problem]:
        """Return what the schema cannot check of the domain's keys."""
        problems = []
        for name in ("prompt", "call"):
            try:
                list(string.Formatter().parse(getattr(config, name)))
            except ValueError as error:
                problems.append(Problem(name, f"not a template: {error}", "write {field}"))
        trace = config.trace
        if trace.fold != "none" and not trace.over:
            problems.append(Problem("trace.over", "a fold is over a field of the metadata"))
        if trace.fold == "count" and not trace.target:
            problems.append(Problem("trace.target", "what is counted?", "a character, or a field"))
        if trace.fold != "none" and config.thinking.mode == "free":
            message = "in mode free the thought would be part of the answer"
            problems.append(Problem("trace.fold", message, "thinking: {mode: think}"))
        if config.call and not config.environment:
            hint = "environment: {calculator: {}}"
            problems.append(Problem("call", "no environment would answer it", hint))
        return problems

    def prompts(self, split: Split) -> list[Prompt]:
        """Return the distinct prompts of one side of the split."""
        return distinct_prompts(
            (self._prompt(i) for i in range(self.config.items)),
            split,
            self.config,
        )

    def _prompt(self, index: int) -> Prompt:
        config = self.config
        try:
            item = self.dataset[index]
        except Exception as error:
            cause = f"{type(error).__name__}: {error!s:.200}"
            raise UsageError(
                f"data.{self.domain}.config: {config.task} makes no question {index}: {cause}",
                "settings that pass its checks may still leave nothing to draw from",
            ) from error
        text = self._filled("prompt", item) if config.prompt else item["question"]
        calls = (self._filled("call", item),) if config.call else ()
        thought, answer = self._filled("trace", item), item["answer"]
        if config.answer == "list":
            answer = format_value(json.loads(answer.replace("'", '"')), config.separator)
        if config.lowercase:
            text, answer = text.lower(), answer.lower()
        lead = config.thinking.lead(thought)
        item = {"index": index}
        return Prompt(question_id(self.domain, text), self.domain, text, answer, item, lead, calls)

    def _filled(self, name: str, item: dict) -> str:
        """Fill a template, or the trace, with the metadata of an item."""
        try:
            if name == "trace":
                return self.config.trace.write(item["metadata"], self.config.lowercase)
            fields = FieldFormatter(self.config.separator)
            return fields.vformat(getattr(self.config, name), (), item["metadata"])
        except (ValueError, TypeError) as error:
            raise UsageError(f"data.{self.domain}.{name}: {error}") from None
        except KeyError as error:
            known = ", ".join(k for k in item["metadata"] if not k.startswith("source"))
            raise UsageError(
                f"data.{self.domain}.{name}: no field {error}", f"fields: {known}"
            ) from None

    def score(self, prompt: Prompt, text: str) -> float:
        """Return 1 if the scorer gives the answer, without its thinking, full marks; else 0."""
        answer = self.config.thinking.split(text)[1].strip()
        if self.config.answer == "list":
            separator = self.config.separator
            answer = json.dumps(answer.split(separator) if separator else list(answer))
        if self.arithmetic and (not ARITHMETIC.fullmatch(answer) or "**" in answer):
            return 0.0
        index = prompt.item["index"]
        if index not in self.entries:
            self.entries[index] = self.dataset[index]
        try:
            return float(self.dataset.score_answer(answer, entry=self.entries[index]) == 1.0)
        except Exception:  # some scorers raise, anything, on an answer they cannot read
            return 0.0


def make_scorer_safe(task: str, dataset: Any, where: str) -> bool:
    """Make a data set's scorer safe; return True if it may get arithmetic only.

    Raises:
        UsageError: the scorer would execute an answer, and cannot be made safe.
    """
    inner = [make_scorer_safe(n, d, where) for n, d in getattr(dataset, "datasets", {}).items()]
    scorer = type(dataset).score_answer
    called = global_names(scorer.__code__)
    if "eval" in called:
        sys.modules[scorer.__module__].eval = ast.literal_eval
    executes = called & {"parse_expr", "sympify", "exec", "compile", "__import__"}
    if executes and task not in OF_ARITHMETIC:
        hint = "another task, or data of your own with verifier: math"
        raise UsageError(f"{where}: {task}: its scorer would execute a model's answer", hint)
    return bool(executes) or any(inner)


def global_names(code: CodeType) -> set[str]:
    """Return the names that a function looks up, its inner functions included."""
    inner = [global_names(c) for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*inner)


class FieldFormatter(string.Formatter):
    """A formatter of ``{field}`` only: no attributes, no indexing. It joins lists."""

    def __init__(self, separator: str) -> None:
        self.separator = separator

    def get_field(self, name, args, kwargs):
        return kwargs[name], name

    def format_field(self, value, spec):
        return format(format_value(value, self.separator), spec)


def format_value(value: Any, separator: str) -> Any:
    """Return a list, nested or not, as text, a whole number without ``.0``, other values as is."""
    if isinstance(value, list | tuple):
        return separator.join(str(format_value(v, separator)) for v in value)
    text = str(value)
    return text[:-2] if text.endswith(".0") and text[:-2].lstrip("-").isdigit() else value
