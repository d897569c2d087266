"""Rewards that compare an answer with the gold one by degrees: triples, intervals and boxes, numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from surgery.errors import SurgeryError
from surgery.tasks import numeric_answer
from surgery.training.rewards.base import REWARDS, rows_of, text_of
from surgery.training.rewards.correctness import number

Triple = tuple[str, ...]

_TRIPLE = re.compile(r"[(\[]\s*([^,()\[\]]+?)\s*,\s*([^,()\[\]]+?)\s*,\s*([^,()\[\]]+?)\s*[)\]]")
_FIGURE = re.compile(r"(?<![\d.])-?(?:\d+(?:\.\d+)?|\.\d+)")  # no sign right after a digit: "3-7" is 3 and 7
_CONFIDENCE = re.compile(r"confidence\W*(\d*\.?\d+)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Base of the rewards that compare each completion with the column `gold` of its row."""

    gold: str = "answer"

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the data must have."""
        return (self.gold,)

    def value(self, text: str, gold: Any) -> float | None:
        """The reward of one completion."""
        raise NotImplementedError

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        """One value per completion; None where the gold answer can't be read."""
        rows = rows_of(prompts, columns)
        return [self.value(text_of(c), row.get(self.gold)) for c, row in zip(completions, rows, strict=True)]


def triples(value: Any) -> list[Triple]:
    """Triples `(object, attribute, value)` of a text or a list, as lower-case words."""
    found = _TRIPLE.findall(value) if isinstance(value, str) else value
    return [tuple(str(part).strip(" \"'").lower() for part in triple) for triple in found]


def matched(gold: Sequence[Triple], said: Sequence[Triple]) -> tuple[list[int], int]:
    """How many predictions match a gold triple in 3, 2 and 1 leading parts, and how many match none.

    Each gold triple is used once, by the prediction that shares most with it.
    """
    left, open_, counts = list(gold), list(said), []
    for parts in (3, 2, 1):
        before, rest = len(open_), []
        for one in open_:
            partner = next((g for g in left if g[:parts] == one[:parts]), None)
            if partner is None:
                rest.append(one)
            else:
                left.remove(partner)
        open_ = rest
        counts.append(before - len(rest))
    return counts, len(open_)


@REWARDS.register("triples")
@dataclass(frozen=True, kw_only=True)
class Triples(Compared):
    """Per predicted (object, attribute, value): `full` when all match, `pair` for object and attribute, `single` for
    the object; `-penalty` for each prediction that matches nothing and for each triple too few.

    STAR-R1 (arXiv:2505.15804) with `{triples: 1, format: 1}`. Ours: a gold triple is matched once, so that repeating
    a right triple earns nothing; and the size of the penalty, which we could not check.
    """

    full: float = 5.0
    pair: float = 1.5
    single: float = 0.5
    penalty: float = 1.0

    def value(self, text: str, gold: Any) -> float | None:
        """The reward of one completion."""
        right = [] if gold is None else triples(gold)
        if not right or any(len(t) != 3 for t in right):
            return None
        said = triples(text.rpartition("<answer>")[2])
        (all_, two, one), none = matched(right, said)
        missing = max(0, len(right) - len(said))
        return self.full * all_ + self.pair * two + self.single * one - self.penalty * (none + missing)


def box(value: Any, size: int | None = None) -> list[float] | None:
    """Lower bounds and then upper bounds, from a list or the last `size` figures of a text; None when it is no box."""
    try:
        figures = _FIGURE.findall(value)[-(size or 0) :] if isinstance(value, str) else value
        found = [float(f) for f in figures]
    except (TypeError, ValueError):
        return None
    half = len(found) // 2
    whole = len(found) == (size or len(found)) and half and len(found) % 2 == 0
    return found if whole and all(a <= b for a, b in zip(found[:half], found[half:], strict=True)) else None


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes of one dimension; 1 for two equal ones without extent."""
    half = len(a) // 2
    shared = [
        min(high_a, high_b) - max(low_a, low_b)
        for low_a, low_b, high_a, high_b in zip(a[:half], b[:half], a[half:], b[half:], strict=True)
    ]
    inside = prod(max(0.0, side) for side in shared)
    union = sum(prod(high - low for low, high in zip(c[:half], c[half:], strict=True)) for c in (a, b)) - inside
    return inside / union if union > 0 else float(list(a) == list(b))


@REWARDS.register("iou")
@dataclass(frozen=True, kw_only=True)
class IoU(Compared):
    """Intersection over union of an interval `[low, high]` or a box `[x1, y1, x2, y2]`; 0 when none can be read.

    With `confidence: true` times the number after the word "confidence", 0 when there is none between 0 and 1.
    """

    confidence: bool = False

    def value(self, text: str, gold: Any) -> float | None:
        """The reward of one completion."""
        right = box(gold)
        if right is None:
            return None
        factor = 1.0
        if self.confidence:
            stated = _CONFIDENCE.search(text)
            factor = float(stated[1]) if stated else 0.0
            factor = factor if factor <= 1 else 0.0
            text = _CONFIDENCE.sub("", text)
        said = box(text, len(right))
        return 0.0 if said is None else factor * overlap(said, right)


@REWARDS.register("numeric")
@dataclass(frozen=True, kw_only=True)
class Numeric(Compared):
    """1 within `tolerance` of the gold number, else `max(0, 1 - |a - b| / scale)`, or 0 with `scale` 0."""

    tolerance: float = 0.0
    scale: float = 0.0

    def __post_init__(self) -> None:
        if self.tolerance < 0 or self.scale < 0:
            raise SurgeryError("Reward 'numeric': tolerance and scale must not be negative.")

    def value(self, text: str, gold: Any) -> float | None:
        """The reward of one completion."""
        said, right = numeric_answer(text), number(gold)
        if said is None or right is None:
            return None if right is None else 0.0
        distance = abs(said - right)
        if distance <= self.tolerance:
            return 1.0
        return max(0.0, 1.0 - distance / self.scale) if self.scale else 0.0
