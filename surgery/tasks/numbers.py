"""Arithmetic with more than digits: addition in columns, and countdown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from random import Random
from typing import Any

from surgery.errors import SurgeryError
from surgery.tasks.base import Example, Size, bounds, counted, draw, marked_answer, task


@task("addition", "the sum of two numbers, worked out column by column with carries")
def addition(rng: Random, *, digits: Size = (2, 4), carries: Size | None = None) -> Example:
    """`digits` a number; `carries` of them carry into the next column (any share when None).

    The difficulty counts the additions of digits: one a column, and one a carry.
    """
    fewest, most = bounds("digits", digits, 1, 30)
    low, high = (0, most) if carries is None else bounds("carries", carries, 0, 30)
    if low > most:
        raise SurgeryError(f"Option 'carries' asks for {low} carries in {most} digits.", hint="Use more digits.")
    n = rng.randint(max(fewest, low), most)
    k = rng.randint(low, min(high, n))
    carrying = set(rng.sample(range(n), k))
    carry, first, second, work = 0, "", "", ""
    for column in range(n):
        least = int(column == n - 1 and n > 1)  # no number starts with 0
        pairs = [
            (a, b) for a in range(least, 10) for b in range(least, 10) if (a + b + carry >= 10) == (column in carrying)
        ]
        a, b = rng.choice(pairs)
        total = a + b + carry
        work += f"{a}+{b}{'+1' if carry else ''}={total};"
        carry, first, second = total // 10, f"{a}{first}", f"{b}{second}"
    answer = str(int(first) + int(second))
    label = f"{counted(n, 'digit')}, {counted(k, 'carry')}"
    return Example(f"a {first}+{second}=", f"{work}#{answer}", answer, n + k, label, {"digits": n, "carries": k})


_TOKEN = re.compile(r"\s*([0-9]{1,9}|[-+*/()])")


def evaluate(expression: str) -> tuple[Fraction, list[int]] | None:
    """The exact value of an expression of whole numbers, `+ - * /` and brackets, and the numbers it uses.

    None for anything else: also for division by zero, over 200 characters or 20 brackets. Nothing is executed.
    """
    text, tokens, at = expression.strip(), list[str](), 0
    if len(text) > 200 or text.count("(") > 20:
        return None
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            return None
        tokens.append(found[1])
        at = found.end()
    tokens.append("")
    used = list[int]()

    def factor() -> Fraction:
        token = tokens.pop(0)
        if token == "(":
            value = terms()
            if tokens.pop(0) != ")":
                raise ValueError
            return value
        used.append(int(token))  # ValueError for anything but a number
        return Fraction(used[-1])

    def product() -> Fraction:
        value = factor()
        while tokens[0] in ("*", "/"):
            value = value * factor() if tokens.pop(0) == "*" else value / factor()
        return value

    def terms() -> Fraction:
        value = product()
        while tokens[0] in ("+", "-"):
            value = value + product() if tokens.pop(0) == "+" else value - product()
        return value

    try:
        value = terms()
        return (value, used) if tokens == [""] else None
    except (ValueError, IndexError, ZeroDivisionError):
        return None


def reaches(completion: str, row: Mapping[str, Any]) -> bool:
    """Whether what follows the last `#` uses each of the row's numbers once and has the target as its value."""
    found = evaluate(marked_answer(completion) or "")
    return found is not None and found[0] == row["target"] and sorted(found[1]) == sorted(row["numbers"])


@task("countdown", "an expression that uses each given number once and reaches the target", reaches)
def countdown(rng: Random, *, numbers: Size = (3, 4), largest: int = 9, operators: str = "+-") -> Example:
    """`numbers` numbers up to `largest`. With `*` or `/` among the operators, answers have brackets (not tiny)."""
    bounds("largest", largest, 1, 999)
    if not operators or not set(operators) <= set("+-*/"):
        raise SurgeryError(f"Option 'operators' is {operators!r}, expected some of '+-*/'.")
    n = draw(rng, "numbers", numbers, 2, 10)
    for _ in range(10_000):
        given = [rng.randint(1, largest) for _ in range(n)]
        value, text = _combined(rng, given, operators)
        if value.denominator == 1 and 0 <= value < 10_000:
            break
    else:
        raise SurgeryError(f"No target was found for {n} numbers up to {largest} and the operators '{operators}'.")
    shown = sorted(given)
    columns = {"numbers": shown, "target": int(value)}
    prompt = f"k {' '.join(map(str, shown))};{value}="
    return Example(prompt, f"#{text}", text, n, counted(n, "number"), columns)


def _combined(rng: Random, given: list[int], operators: str) -> tuple[Fraction, str]:
    """As in the game, two parts become one until one is left: its value and how it came about.

    Sums and differences alone are taken from left to right, so that they need no brackets.
    """
    flat = set(operators) <= set("+-")
    parts = [(Fraction(v), str(v)) for v in given]
    while len(parts) > 1:
        (x, left), (y, right) = (parts.pop(0 if flat else rng.randrange(len(parts))) for _ in range(2))
        sign = rng.choice(operators)
        if sign == "/" and y == 0:
            return Fraction(-1), ""
        value = x + y if sign == "+" else x - y if sign == "-" else x * y if sign == "*" else x / y
        text = f"{left}{sign}{right}"
        parts.insert(0, (value, text if flat or not parts else f"({text})"))
    return parts[0]
