"""Answers compared as mathematics by math-verify: LaTeX and expressions.

math-verify runs in a process of its own, which is ended when an answer takes too long: its own
timeout is a signal, and cannot interrupt arithmetic on a number of a billion digits.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.rollout.verifiers._child import Child
from opdctl.rollout.verifiers._verifier import SingleAnswerVerifier

MARKS = ("$", "\\boxed", "\\(", "\\[")


class Math(SingleAnswerVerifier):
    """Equal as mathematics, by math-verify, in a process with a time limit."""

    revision = 1

    @dataclass(kw_only=True)
    class Config:
        """The keys of a comparison by math-verify."""

        timeout: float = key(10.0, "seconds of one comparison; longer is wrong", least=0.1)
        memory_mib: int = key(4096, "address space of its process, MiB", least=512)

    def __init__(self, config, ctx, domain: str) -> None:
        super().__init__(config, ctx, domain)
        first = ("1", "$2$")
        limits = (config.timeout, config.memory_mib)
        self.child = Child("opdctl.rollout.verifiers.math", "equal", *limits, first, ctx.check)

    def grade(self, prompt, answer: str) -> float:
        """Return 1 if answer and reference answer are equal, else 0.

        Raises:
            TimeoutError: the comparison took too long.
            RuntimeError: math-verify raised, or its process died.
        """
        return self.child.ask(prompt.answer, answer)


def equal(reference: str, answer: str) -> bool:
    """Return True if math-verify finds the answer equal to the reference; runs in the child.

    Raises:
        ValueError: the reference is no mathematics, so that every answer would be wrong.
    """
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeout is off
    if not any(mark in reference for mark in MARKS):
        reference = f"${reference}$"  # bare LaTeX is read between marks only
    gold = parse(reference, parsing_timeout=None, raise_on_error=True)
    if not gold:
        raise ValueError(f"math-verify reads nothing in the reference answer {reference!r:.80}")
    parsed = parse(answer, parsing_timeout=None)
    return bool(verify(gold, parsed, timeout_seconds=None))
