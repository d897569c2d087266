"""Formulas such as `large + 1.0*(small_tuned - small_base)`: parsed here, never evaluated as Python.

    formula = product (("+" | "-") product)*          names    Python's identifiers, or quoted: 'tiny-base', "my model"
    product = signed (("*" | "/") signed)*            numbers  1  .5  1e-3
    signed  = ("+" | "-")* (number | name | "(" formula ")")

A name stands for a model, a vector, or whatever `evaluate` is given: such things can be added, and multiplied or
divided by numbers. Whether a formula does only that is seen without them: nothing large is loaded for a wrong one.
Errors show the formula and point at the place.
"""

from __future__ import annotations

import math
import operator
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from surgery.errors import SurgeryError
from surgery.registry import nearest

MAX_DEPTH = 100
"""Brackets within brackets."""
MAX_LENGTH = 10_000
"""Characters."""
SHOWN = 100
"""Characters of a long formula that an error shows."""

_NUMBER = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
}  # fmt: skip
_INSTEAD = {
    character: hint
    for characters, hint in (
        ("\u2212\u2013\u2014", "A minus is written -."),
        ("\u00d7\u00b7\u22c5\u2217", "Times is written *."),
        ("\u00f7", "Divided by is written /."),
        ("\u2018\u2019\u201c\u201d`", "Names are quoted as in 'tiny-base'."),
        ("[]{}", "Brackets are round ones."),
        ("^\u00b2\u00b3", "There are no powers."),
        (".", "A name with a point in it is quoted."),
        (",", "Decimals come after a point, as in 0.5."),
        ("=", "What a name stands for is said outside of the formula."),
    )
    for character in characters
}
"""What is meant by characters that have no place in a formula."""


def names_in(formula: str, known: Collection[str] | None = None, what: str = "model") -> list[str]:
    """The names that occur in `formula`, in order, each once.

    Raises `SurgeryError` for a formula that can't be computed, and for names other than the `known` (None: any goes).
    `what` is the word for that which names stand for.
    """
    parser = _Parser(formula, what)
    parser.parsed()
    if known is not None:
        parser.check(known)
    return list(parser.names)


def evaluate(formula: str, values: Mapping[str, Any], what: str = "model") -> Any:
    """What `formula` comes to, computed with the operators of the `values` that its names stand for.

    Raises `SurgeryError` that points at the place of what is wrong. `what` is the word for a value in it ("vector").
    """
    parser = _Parser(formula, what)
    steps = parser.parsed()
    parser.check(values)
    stack: list[Any] = []
    for step in steps:
        try:
            if step.name is not None:
                stack.append(values[step.name])
            elif step.sign == "negative":
                stack.append(-stack.pop())
            else:
                right = stack.pop() if step.right is None else step.right
                left = stack.pop() if step.left is None else step.left
                stack.append(_OPERATORS[step.sign](left, right))
        except (TypeError, ArithmeticError) as error:
            parser.wrong(step.at, f"This can't be computed with these {what}s ({error})")
    return stack.pop()


@dataclass(frozen=True, slots=True)
class _Step:
    """One step of the computation on a stack: put a named value there, or replace its last ones by what they come to.

    `left` or `right` is a number that stands on that side of the operator, None where the stack's last value does.
    """

    at: int
    name: str | None = None
    sign: str = ""
    left: float | None = None
    right: float | None = None


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of the formula that begins at `start`: a number, or the steps that compute a value."""

    start: int
    number: float | None = None
    steps: list[_Step] = field(default_factory=list)


class _Parser:
    """Reads one formula from left to right; `at` is where the next token begins, `token` that token ("" at the end)."""

    def __init__(self, formula: str, what: str) -> None:
        self.formula, self.what = formula, what
        self.names: dict[str, int] = {}
        self.at, self.token, self.depth = 0, "", 0
        if not formula.strip():
            raise SurgeryError("The formula is empty.", hint="As in 'a + 0.5*(b - c)'.")
        if len(formula) > MAX_LENGTH:
            raise SurgeryError(f"A formula of {len(formula):,} characters; expected at most {MAX_LENGTH:,}.")
        self._move(0)

    def parsed(self) -> list[_Step]:
        """The steps of the whole formula."""
        part = self._formula()
        if self.token == ")":
            self.wrong(self.at, "This bracket closes none that was opened")
        if self.token:
            self._no_operator()
        if part.number is not None:
            self.wrong(part.start, f"The formula comes to a number, not to a {self.what}", "As in 'a + 0.5*(b - c)'.")
        return part.steps

    # ---- the grammar ------------------------------------------------------------------------------------------------

    def _formula(self) -> _Part:
        left = self._product()
        while self.token in ("+", "-"):
            sign, at = self._taken()
            right = self._product()
            if (left.number is None) != (right.number is None):
                part = right if left.number is None else left
                self.wrong(part.start, f"A number can't be added to a {self.what}, or taken from one",
                           "Numbers multiply and divide.")  # fmt: skip
            left = self._joined(left, sign, at, right)
        return left

    def _product(self) -> _Part:
        left = self._signed()
        while self.token in ("*", "/"):
            sign, at = self._taken()
            right = self._signed()
            if sign == "/" and right.number is None:
                self.wrong(right.start, f"Nothing can be divided by a {self.what}", "A name with a / in it is quoted.")
            if sign == "/" and right.number == 0:
                self.wrong(right.start, "A division by zero")
            if left.number is None and right.number is None:
                self.wrong(at, f"A {self.what} can't be multiplied by a {self.what}", "Numbers multiply and divide.")
            left = self._joined(left, sign, at, right)
        return left

    def _signed(self) -> _Part:
        start, negative = self.at, False
        while self.token in ("+", "-"):
            negative ^= self._taken()[0] == "-"
        part = self._atom()
        if not negative:
            return _Part(start, part.number, part.steps)
        if part.number is not None:
            return _Part(start, -part.number)
        part.steps.append(_Step(start, sign="negative"))
        return _Part(start, None, part.steps)

    def _atom(self) -> _Part:
        token, at = self.token, self.at
        if token == "(":
            return self._bracket()
        if not token:
            self.wrong(at, "The formula ends where a name, a number or a bracket should follow")
        if token == ")" or token in _OPERATORS:
            power = token == "*" == self.formula[at - 1] and at > 0
            self.wrong(at, f"A name, a number or a bracket is missing before '{token}'",
                       "There are no powers." if power else None)  # fmt: skip
        self._taken()
        if token[0] in "'\"":
            name = token[1:-1]
        elif not _NUMBER.match(token):
            name = token
        else:
            number = float(token)
            return _Part(at, number) if math.isfinite(number) else self.wrong(at, "This number is too large")
        self.names.setdefault(name, at)
        return _Part(at, None, [_Step(at, name)])

    def _bracket(self) -> _Part:
        _, opened = self._taken()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.wrong(opened, f"Brackets are nested more than {MAX_DEPTH} deep")
        part = self._formula()
        if not self.token:
            self.wrong(opened, "This bracket is never closed")
        if self.token != ")":
            self._no_operator()
        self._taken()
        self.depth -= 1
        return _Part(opened, part.number, part.steps)

    def _joined(self, left: _Part, sign: str, at: int, right: _Part) -> _Part:
        if left.number is None or right.number is None:
            left.steps.extend(right.steps)
            left.steps.append(_Step(at, sign=sign, left=left.number, right=right.number))
            return _Part(left.start, None, left.steps)
        number = _OPERATORS[sign](left.number, right.number)
        return _Part(left.start, number) if math.isfinite(number) else self.wrong(at, "This comes to infinity")

    # ---- tokens -----------------------------------------------------------------------------------------------------

    def _taken(self) -> tuple[str, int]:
        """The token and where it begins; moves on to the next."""
        token, at = self.token, self.at
        self._move(at + len(token))
        return token, at

    def _move(self, at: int) -> None:
        text = self.formula
        while at < len(text) and text[at].isspace():
            at += 1
        self.at = at
        if at == len(text):
            self.token = ""
        elif text[at] in "()+-*/":
            self.token = text[at]
        elif text[at] in "'\"":
            end = text.find(text[at], at + 1)
            if end < 0:
                self.wrong(at, "This quotation mark is never closed")
            if end == at + 1:
                self.wrong(at, "A name is missing between the quotation marks")
            self.token = text[at : end + 1]
        elif number := _NUMBER.match(text, at):
            self.token = number.group()
        elif text[at].isidentifier():
            end = at + 1
            while end < len(text) and ("_" + text[end]).isidentifier():
                end += 1
            self.token = text[at:end]
        else:
            hint = _INSTEAD.get(text[at], "Names, numbers, + - * / and brackets make a formula.")
            self.wrong(at, f"A formula can't hold {_quoted(text[at])}", hint)

    def _no_operator(self) -> NoReturn:
        pointed = self.token[0] == "." and not self.formula[self.at - 1].isspace()
        hint = "A name with a point in it is quoted." if pointed else "Put one of + - * / there."
        self.wrong(self.at, f"An operator is missing before {_quoted(self.token)}", hint)

    # ---- errors -----------------------------------------------------------------------------------------------------

    def check(self, known: Collection[str]) -> None:
        """Raises for a name that is not `known`: with the name that was meant, or how one is added."""
        for name, at in self.names.items():
            if name not in known:
                longer = [other for other in known if other != name and self.formula.startswith(other, at)]
                if longer:
                    hint = f"A name that is no word is quoted: '{max(longer, key=len)}'."
                else:
                    hint = (nearest(name, known) + " Or add " if known else "Add ") + f"{name}=PATH."
                self.wrong(at, f"There is no {self.what} {_quoted(name)}", hint)

    def wrong(self, at: int, problem: str, hint: str | None = None) -> NoReturn:
        """Raises: what is wrong, and a caret under the place."""
        start = max(0, min(at - SHOWN // 2, len(self.formula) - SHOWN))
        shown, left = self.formula[start : start + SHOWN], "..." if start else ""
        right = "..." if start + SHOWN < len(self.formula) else ""
        before = left + _visible(self.formula[start:at])
        line = f"  {left}{_visible(shown)}{right}\n  {' ' * sum(map(_columns, before))}^"
        raise SurgeryError(f"{problem}, at character {at + 1} of the formula:\n{line}", hint=hint)


def _visible(text: str) -> str:
    """`text` on one line, as many characters: whitespace as spaces, and what can't be printed as a sign for that."""
    return "".join(" " if c.isspace() else c if c.isprintable() else "\ufffd" for c in text)


def _quoted(text: str) -> str:
    """`text` as an error names it."""
    return _visible(text[:40]) if text[0] in "'\"" else f"'{_visible(text[:40])}'"


def _columns(character: str) -> int:
    """How many columns of a terminal a character takes."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
