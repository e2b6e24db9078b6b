"""A calculator: a response that ends in a call, as in ``[12 * (3 + 4)]``, is answered and goes on.

Exact arithmetic on numbers with + - * / // % and brackets, evaluated from the syntax tree: no text
is executed. Leaves out powers, functions and variables. Any turn that ends in the closing mark
counts as a call, even a list or an interval: choose marks that answers do not end in.
"""

from __future__ import annotations

import ast
import operator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from opdctl.config.schema import key
from opdctl.protocols import Environment

BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class Calculator(Environment):
    """A calculator that answers a turn ending in a call with the value of its expression."""

    revision = 1
    alphabet = "0123456789.-+error"  # the characters of its answers
    refusal = "error"  # the answer to a call that it cannot evaluate

    @dataclass(kw_only=True)
    class Config:
        """The keys of a calculator."""

        open: str = key("[", "opens a call")
        close: str = key("]", "closes it; the turn ends there")
        turns: int = key(1, "calls that are answered", least=1)
        role: Literal["tool", "user"] = key("tool", "whose turn the chat template shows it as")

    def __init__(self, config) -> None:
        self.config = config
        self.turns, self.role = config.turns, config.role

    def reply(self, text: str) -> str | None:
        """Return the answer to a turn; None if it makes no call and so ends the response."""
        body = text.strip()
        if not body.endswith(self.config.close) or self.config.open not in body:
            return None
        inner = body.removesuffix(self.config.close).rpartition(self.config.open)[2]
        try:
            return format_number(evaluate(ast.parse(inner.strip(), mode="eval").body))
        except (ArithmeticError, ValueError, SyntaxError, RecursionError, MemoryError):
            return self.refusal


def evaluate(node: ast.AST) -> Fraction:
    """Return the value of an expression's syntax tree.

    Raises:
        ValueError: a node is not arithmetic on numbers.
        ArithmeticError: division by zero.
    """
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        inner = evaluate(node.operand)
        return -inner if isinstance(node.op, ast.USub) else inner
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        return Fraction(BINARY[type(node.op)](evaluate(node.left), evaluate(node.right)))
    raise ValueError("not arithmetic")


def format_number(number: Fraction) -> str:
    """Write an integer of up to fifteen digits in full, any other number with twelve digits.

    Raises:
        OverflowError: the number is larger than any float.
    """
    whole = number.denominator == 1 and abs(number) < 10**15
    return str(number.numerator) if whole else f"{float(number):.12g}"
