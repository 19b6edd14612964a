"""Integer expressions of rule files: numbers, names, ``+ - * // /`` and parentheses."""

from __future__ import annotations

import ast
from collections.abc import Callable

from ckptengine.errors import RuleError

Expression = int | str
MAX_LENGTH = 200


def evaluate(expression: Expression, variable: Callable[[str], int], where: str) -> int:
    """The value of an expression; ``variable`` gives the value of a name.

    ``/`` must divide exactly, so that ``heads / groups`` cannot be wrong in silence.
    """
    if isinstance(expression, int):
        return expression
    if len(expression) > MAX_LENGTH:
        raise RuleError(f"{where}: the expression {expression[:40]!r}... is too long")
    try:
        tree = ast.parse(expression, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise RuleError(f"{where}: {expression!r} is not an expression of numbers and names") from None
    return _value(tree.body, variable, f"{where}: {expression!r}")


def _value(node: ast.expr, variable: Callable[[str], int], where: str) -> int:
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return value
        case ast.Name(id=name):
            return variable(name)
        case ast.BinOp(left=left, op=operator, right=right):
            return _combine(operator, _value(left, variable, where), _value(right, variable, where), where)
        case _:
            raise RuleError(f"{where} uses more than numbers, names, + - * / // and parentheses")


def _combine(operator: ast.operator, a: int, b: int, where: str) -> int:
    match operator:
        case ast.Add():
            return a + b
        case ast.Sub():
            return a - b
        case ast.Mult():
            return a * b
        case ast.Div() | ast.FloorDiv():
            if b == 0:
                raise RuleError(f"{where} divides by 0")
            if isinstance(operator, ast.Div) and a % b:
                raise RuleError(f"{where}: {a} / {b} leaves a remainder")
            return a // b
        case _:
            raise RuleError(f"{where} uses an operator other than + - * / //")
