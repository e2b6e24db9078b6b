"""Questions -> distinct prompts, split in two by a hash of the canonical question.

Training and evaluation prompts can never overlap, whatever the order or the size of the pool:
which side a question falls on depends on the question alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from opdctl.config.schema import REQUIRED, key
from opdctl.errors import Problem
from opdctl.models.chat.messages import tagged
from opdctl.models.chat.thinking import Thinking
from opdctl.types import Prompt

Split = Literal["train", "eval"]


@dataclass(kw_only=True)
class DomainKeys:
    """Keys of every domain; each kind adds ``eval_share``, with a default of its own."""

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

    def own_problems(self) -> list[Problem]:
        """What the schema cannot see, whatever the domain's kind."""
        found, thinking = [], self.thinking
        if not (thinking.open and thinking.close) or thinking.open == thinking.close:
            found.append(Problem("thinking.close", "two different marks open and close the block"))
        if thinking.switch and thinking.mode == "free":
            what = "in mode free there is nothing to tell the chat template"
            found.append(Problem("thinking.switch", what, "thinking.mode=think, or no_think"))
        if len(self.environment) > 1:
            found.append(Problem("environment", "one at most", "remove all but one"))
        for name, config in self.environment.items():
            if not (config.open and config.close):
                found.append(Problem(f"environment.{name}.close", "two marks enclose a call"))
        return found


def canonical(question: str) -> str:
    """The question with case and white space levelled: what makes two questions the same."""
    return " ".join(question.lower().split())


def digest(domain: str, question: str) -> str:
    """16 hex digits for a question of a domain."""
    text = f"{domain}\x1f{canonical(question)}".encode()
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def side(question: str, eval_share: float) -> Split:
    """Which side of the split a question is on."""
    text = hashlib.blake2b(canonical(question).encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(text, "little") < eval_share * 2**64 else "train"


def distinct(
    prompts: Iterable[Prompt], split: Split, keys: DomainKeys, limit: int = 0
) -> list[Prompt]:
    """All of ``chosen``, in memory."""
    return list(chosen(prompts, split, keys, limit, Counter()))


def chosen(
    prompts: Iterable[Prompt], split: Split, keys: DomainKeys, limit: int, counts: Counter
) -> Iterator[Prompt]:
    """The first ``limit`` distinct prompts of one side, in order; 0 is all.

    The tag of a mode is put on after the split: a question is on one side in all of its modes. So
    are the domain's system turn, and what the chat template is told.

    Args:
        counts: what is left out of that side is added to it: ``empty`` and ``repeated`` questions.
    """
    tag, switch = keys.thinking.tag, None
    if keys.thinking.switch:
        switch = keys.thinking.mode == "think"
    seen: set[int] = set()
    for prompt in prompts:
        if side(prompt.text, keys.eval_share) != split:
            continue
        number = int(prompt.id, 16)  # a third of the memory that its text would take
        if not prompt.text.strip() or number in seen:
            counts["repeated" if number in seen else "empty"] += 1
            continue
        seen.add(number)
        yield replace(
            prompt,
            text=prompt.text + tag,
            messages=tagged(prompt.messages, tag) if prompt.messages else (),
            system=keys.system,
            enable_thinking=switch,
        )
        if len(seen) == limit:
            break
