"""A calculator: a response that ends in a call, as in ``[12 * (3 + 4)]``, is answered and goes on.

Exact arithmetic on numbers with + - * / // % and brackets, read from the syntax tree: nothing is
executed. Leaves out powers, functions and variables. Any turn that ends in the closing mark is a
call, a list or an interval too: choose marks that answers do not end in.
"""

from __future__ import annotations

import ast
import operator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from opdctl.config.schema import key

BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class Calculator:
    """Answers a turn that ends in a call with the value of its expression."""

    revision = 1
    alphabet = "0123456789.-+error"  # of its answers
    refusal = "error"

    @dataclass(kw_only=True)
    class Config:
        """Keys of a calculator."""

        open: str = key("[", "opens a call")
        close: str = key("]", "closes it; the turn ends there")
        turns: int = key(1, "calls that are answered", least=1)
        role: Literal["tool", "user"] = key("tool", "whose turn the chat template shows it as")

    def __init__(self, config) -> None:
        self.config = config
        self.turns, self.role = config.turns, config.role

    def reply(self, text: str) -> str | None:
        """The answer to a turn, or None: it makes no call and is the response's last."""
        body = text.strip()
        if not body.endswith(self.config.close) or self.config.open not in body:
            return None
        inner = body.removesuffix(self.config.close).rpartition(self.config.open)[2]
        try:
            return written(value(ast.parse(inner.strip(), mode="eval").body))
        except (ArithmeticError, ValueError, SyntaxError, RecursionError, MemoryError):
            return self.refusal


def value(node: ast.AST) -> Fraction:
    """Value of an expression's syntax tree.

    Raises:
        ValueError: it holds something that is not arithmetic on numbers.
        ArithmeticError: division by zero.
    """
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        inner = value(node.operand)
        return -inner if isinstance(node.op, ast.USub) else inner
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        return Fraction(BINARY[type(node.op)](value(node.left), value(node.right)))
    raise ValueError("not arithmetic")


def written(number: Fraction) -> str:
    """A whole number of up to fifteen digits as it is, any other with twelve significant ones.

    Raises:
        OverflowError: no float is as large.
    """
    whole = number.denominator == 1 and abs(number) < 10**15
    return str(number.numerator) if whole else f"{float(number):.12g}"
