"""Formulas of vectors, as `a - b + 0.5*(c + d)`: read with `ast`, never evaluated as Python."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from surgery.weights.vector import TaskVector

MAX_DEPTH = 100
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


def names_in(formula: str) -> list[str]:
    """The names of vectors that occur in `formula`, in order, each once."""
    return list(dict.fromkeys(node.id for node in ast.walk(_parsed(formula)) if isinstance(node, ast.Name)))


def evaluate(formula: str, vectors: Mapping[str, TaskVector]) -> TaskVector:
    """The vector that `formula` describes: names of vectors, numbers, + - * / and brackets.

    Raises `SurgeryError` for anything else, for unknown names, and where the result is no vector.
    """
    try:
        found = _value(_parsed(formula), vectors, 0)
    except TypeError:
        raise SurgeryError(
            f"'{formula}' makes no sense: vectors can be added, and multiplied or divided by numbers."
        ) from None
    except ZeroDivisionError:
        raise SurgeryError(f"'{formula}' divides by zero.") from None
    if isinstance(found, (int, float)):
        raise SurgeryError(f"'{formula}' is a number, not a vector.", hint="As in 'a - b + 0.5*c'.")
    return found


def _parsed(formula: str) -> ast.expr:
    try:
        return ast.parse(formula.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise SurgeryError(f"'{formula[:200]}' is no formula.", hint="Write it like 'a - b + 0.5*c'.") from None


def _value(node: ast.expr, vectors: Mapping[str, TaskVector], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise SurgeryError("The formula is nested too deeply.")
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = (_value(side, vectors, depth + 1) for side in (node.left, node.right))
        return _OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _value(node.operand, vectors, depth + 1)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return float(node.value)
    if isinstance(node, ast.Name):
        if node.id not in vectors:
            raise SurgeryError(f"The formula uses '{node.id}', which was not given.", hint=f"Add {node.id}=FILE.")
        return vectors[node.id]
    raise SurgeryError(
        f"A formula can't hold '{ast.unparse(node)[:80]}'.", hint="Names, numbers, + - * / and brackets make one."
    )
