"""Rewards that ask one question: is the answer right? And the checkers that they share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from surgery.registry import Registry
from surgery.tasks import marked_answer, numeric_answer, verify
from surgery.tasks.word_problems import same_expression
from surgery.training.rewards.base import REWARDS, Row, rows_of, text_of


class Verifier(NamedTuple):
    """A way to check an answer."""

    correct: Callable[[str, Row, str], bool | None]
    """(completion, row, gold column) -> right or wrong, None when the gold answer can't be read."""
    extract: Callable[[str], Any]
    """The answer in a completion, None when there is none."""
    reads_gold: bool = True
    """Whether the answer is read from the gold column; otherwise the row's task knows."""


VERIFIERS: Registry[Verifier] = Registry("verifier")


def _by_task(text: str, row: Row, gold: str) -> bool | None:
    return verify(text, row)


def _task_answer(text: str) -> Any:
    return marked_answer(text) or numeric_answer(text)


def exact_answer(text: str) -> str | None:
    """What follows the last `#` or else the whole text, without space around it; None when that is empty."""
    return (marked_answer(text) if "#" in text else text.strip()) or None


def _exact(text: str, row: Row, gold: str) -> bool | None:
    right = row.get(gold)
    return None if right is None else exact_answer(text) == str(right).strip()


def number(value: Any) -> float | None:
    """A number, or the last one of a text; None when there is none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return None if value is None else numeric_answer(str(value))


def _numeric(text: str, row: Row, gold: str) -> bool | None:
    said, right = numeric_answer(text), number(row.get(gold))
    return None if right is None else said is not None and abs(said - right) <= 1e-6 * max(1.0, abs(right))


def _math(text: str, row: Row, gold: str) -> bool | None:
    right = row.get(gold)
    return None if right is None else same_expression(text, {"answer": right})


def _expression(text: str) -> Any:
    from math_verify import parse

    # its time limit is an alarm, which only the main thread may set
    seconds: Any = 5 if threading.current_thread() is threading.main_thread() else None
    return parse(text, parsing_timeout=seconds) or None


VERIFIERS.register("task")(Verifier(_by_task, _task_answer, reads_gold=False))
VERIFIERS.register("exact")(Verifier(_exact, exact_answer))
VERIFIERS.register("numeric")(Verifier(_numeric, numeric_answer))
VERIFIERS.register("math")(Verifier(_math, _expression))


@dataclass(frozen=True, kw_only=True)
class Verified:
    """Base of the rewards that depend on correctness.

    `verifier` is `task` (the verifier of the row's task), `exact` (the text after the last `#`, or all of it),
    `numeric` (the last number, to 1e-6) or `math` (math-verify); `gold` is the column with the right answer.
    """

    verifier: str = "task"
    gold: str = "answer"

    def __post_init__(self) -> None:
        VERIFIERS.lookup(self.verifier)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the data must have."""
        return (self.gold,) if VERIFIERS.lookup(self.verifier).reads_gold else ("task",)

    def correct(self, prompts: list[Any], completions: list[Any], columns: dict[str, Any]) -> list[bool | None]:
        """Right, wrong or undecidable, one a completion."""
        check = VERIFIERS.lookup(self.verifier).correct
        rows = rows_of(prompts, columns)
        return [check(text_of(c), row, self.gold) for c, row in zip(completions, rows, strict=True)]


@REWARDS.register("accuracy")
@dataclass(frozen=True, kw_only=True)
class Accuracy(Verified):
    """1 when the answer is right, 0 when it is wrong, None when the gold answer can't be read."""

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        """One value per completion."""
        return [None if c is None else float(c) for c in self.correct(prompts, completions, columns)]


@REWARDS.register("partial")
@dataclass(frozen=True, kw_only=True)
class Partial(Verified):
    """1 when right; `partial` when an answer could be extracted but is wrong; 0 otherwise.

    ReFT (Luong et al. 2024, arXiv:2401.08967) with 0.1.
    """

    partial: float = 0.1

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        """One value per completion."""
        extract = VERIFIERS.lookup(self.verifier).extract
        right = self.correct(prompts, completions, columns)
        wrong = (0.0 if extract(text_of(c)) is None else self.partial for c in completions)
        return [None if r is None else 1.0 if r else w for r, w in zip(right, wrong, strict=True)]
