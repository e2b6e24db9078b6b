"""Questions -> distinct prompts, split in two by a hash of the canonical question.

Training and evaluation prompts never overlap, whatever the order or the size of the pool: the side
of a question depends on the question alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from opdctl.config.schema import REQUIRED, key
from opdctl.errors import Problem
from opdctl.models.chat.messages import with_tag
from opdctl.models.chat.thinking import Thinking
from opdctl.rollout.extraction import Extract
from opdctl.types import Prompt

Split = Literal["train", "eval"]


@dataclass(kw_only=True)
class DomainKeys:
    """The keys of every domain; each kind adds ``eval_share``, with a default of its own.

    The attributes without a type stand for keys that only tables have. They are no fields: with a
    type, ClassVar or not, they would stand first among the keys of tables and change fingerprints.
    """

    verifier = {}  # procedural data verifies its answers itself
    messages_column = ""
    tools_column = ""
    path = ""
    eval_share = 0.0
    reference = Extract()

    kind: str = key(REQUIRED, "the domain's kind; `opdctl ls data` lists them")
    thinking: Thinking = key(
        Thinking(), "whether a response thinks before it answers", neutral=True
    )
    system: str = key(
        "", "system turn before each question that has none of its own; empty: none", neutral=True
    )
    environment: dict = key(
        {}, "what answers a call; one at most", family="environments", neutral=True
    )
    extract: Extract = key(
        Extract(), "what of a response, after its thinking, is its answer", neutral=True
    )

    def common_problems(self) -> list[Problem]:
        """Return what the schema cannot check of the keys that all kinds share."""
        problems, thinking = self.extract.problems("extract"), self.thinking
        if not (thinking.open and thinking.close) or thinking.open == thinking.close:
            problems.append(
                Problem("thinking.close", "two different marks open and close the block")
            )
        if thinking.switch and thinking.mode == "free":
            message = "in mode free there is nothing to tell the chat template"
            hint = "thinking.mode=think, or no_think"
            problems.append(Problem("thinking.switch", message, hint))
        if len(self.environment) > 1:
            problems.append(Problem("environment", "one at most", "remove all but one"))
        for name, config in self.environment.items():
            if not (config.open and config.close):
                problems.append(Problem(f"environment.{name}.close", "two marks enclose a call"))
        return problems


def canonical(question: str) -> str:
    """Return the question in lower case with single spaces; equal ones are the same question."""
    return " ".join(question.lower().split())


def question_id(domain: str, question: str) -> str:
    """Return the id of a question of a domain: 16 hex digits."""
    text = f"{domain}\x1f{canonical(question)}".encode()
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def split_of(question: str, eval_share: float) -> Split:
    """Return the side of the split that a question is on."""
    text = hashlib.blake2b(canonical(question).encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(text, "little") < eval_share * 2**64 else "train"


def distinct_prompts(
    prompts: Iterable[Prompt], split: Split, keys: DomainKeys, limit: int = 0
) -> list[Prompt]:
    """Return the prompts of ``iterate_distinct`` as a list."""
    return list(iterate_distinct(prompts, split, keys, limit, Counter()))


def iterate_distinct(
    prompts: Iterable[Prompt], split: Split, keys: DomainKeys, limit: int, counts: Counter
) -> Iterator[Prompt]:
    """Yield the first ``limit`` distinct prompts of one side, in order; 0 is all.

    The tag of a mode, the domain's system turn and ``enable_thinking`` are added after the split: a
    question is on the same side in all of its modes.

    Args:
        counts: the prompts left out of that side are counted here, as ``empty`` or ``repeated``.
    """
    tag, switch = keys.thinking.tag, None
    if keys.thinking.switch:
        switch = keys.thinking.mode == "think"
    seen: set[int] = set()
    for prompt in prompts:
        if split_of(prompt.text, keys.eval_share) != split:
            continue
        number = int(prompt.id, 16)  # a third of the memory that its text would take
        if not prompt.text.strip() or number in seen:
            counts["repeated" if number in seen else "empty"] += 1
            continue
        seen.add(number)
        yield replace(
            prompt,
            text=prompt.text + tag,
            messages=with_tag(prompt.messages, tag) if prompt.messages else (),
            system=keys.system,
            enable_thinking=switch,
        )
        if len(seen) == limit:
            break
