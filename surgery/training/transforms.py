"""Transforms of rows: from what a data set says to what a method reads. A recipe's `data` names one, or a list.

    data: {task: chain, transform: corrupt}                                   # pairs for DPO
    data: {file: tried.jsonl, transform: {band: {column: pass_rate, low: 0.1, high: 0.9}}}
    data: {task: chain, transform: [{template: {prompt: "Q: {prompt}"}}, corrupt]}

| name | gives |
|---|---|
| corrupt | pairs: `chosen` is the completion, `rejected` the completion with something changed that makes it wrong |
| template | columns from templates over the others |
| band | only rows whose number in a column is within bounds (data of known size only) |

A transform is a callable `(row, rng) -> row or list of rows`, made by a registered factory from its parameters. `rng`
depends on the run's seed and the row's index alone. For generated data it must give exactly one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from surgery.errors import SurgeryError
from surgery.registry import Registry
from surgery.training.named import made

Row = dict[str, Any]
Transform = Callable[[Row, Random], Row | list[Row]]
TRANSFORMS: Registry[Callable[..., Transform]] = Registry("transform")
TRIES = 100
"""Corruptions tried before a row is given up."""


def parse(written: Any) -> Transform:
    """The transform that a recipe writes: a name, `{name: {parameter: value}}`, a callable, or a list of these."""
    if isinstance(written, Sequence) and not isinstance(written, str):
        parts = [parse(part) for part in written]

        def chained(row: Row, rng: Random) -> list[Row]:
            rows = [row]
            for part in parts:
                rows = [new for old in rows for new in applied(part, old, rng)]
            return rows

        return chained
    return made(TRANSFORMS, written)


def applied(transform: Transform, row: Row, rng: Random) -> list[Row]:
    """The rows that one row becomes."""
    found = transform(row, rng)
    return [found] if isinstance(found, dict) else list(found)


@TRANSFORMS.register("corrupt")
def corrupt(changes: int = 1) -> Transform:
    """Pairs from demonstrations: `rejected` is the completion with `changes` letters or digits replaced by others.

    A row with a task gets a completion that its verifier rejects; one without only gets another text. Raises
    `SurgeryError` when a row has no completion, or no wrong one is found.
    """
    if changes < 1:
        raise SurgeryError(f"Transform 'corrupt': changes is {changes}; expected at least 1.")

    def pair(row: Row, rng: Random) -> Row:
        text = row.get("completion")
        if not text:
            raise SurgeryError("Transform 'corrupt' needs rows with the column 'completion'.")
        for _ in range(TRIES):
            wrong = _changed(text, changes, rng)
            if wrong != text and not _right(wrong, row):
                return {**row, "chosen": text, "rejected": wrong}
        raise SurgeryError(
            f"No change of {changes} characters makes {text[:80]!r} wrong.", hint="Raise `changes` of 'corrupt'."
        )

    return pair


def _changed(text: str, changes: int, rng: Random) -> str:
    """Digits become other digits, letters other letters of their case; signs stay."""
    letters = list(text)
    places = [i for i, c in enumerate(text) if c.isascii() and c.isalnum()]
    for i in rng.sample(places, min(changes, len(places))):
        old = letters[i]
        pool = "0123456789" if old.isdigit() else "abcdefghijklmnopqrstuvwxyz"
        new = rng.choice([c for c in pool if c != old.lower()])
        letters[i] = new.upper() if old.isupper() else new
    return "".join(letters)


def _right(text: str, row: Row) -> bool:
    if "task" not in row:
        return False
    from surgery.tasks import verify

    return verify(text, row) is True


@TRANSFORMS.register("template")
def template(**columns: str) -> Transform:
    """Columns from templates over the row's columns: `{template: {prompt: "Q: {prompt}\\nA:"}}`."""

    def fill(row: Row, rng: Random) -> Row:
        return {**row, **{name: _filled(text, row) for name, text in columns.items()}}

    return fill


@TRANSFORMS.register("band")
def band(column: str, low: float = float("-inf"), high: float = float("inf")) -> Transform:
    """Only rows with low <= row[column] <= high: difficulty, or a pass rate that was measured before."""

    def inside(row: Row, rng: Random) -> list[Row]:
        if column not in row:
            raise SurgeryError(f"Transform 'band': no column '{column}'.", hint=f"Columns: {', '.join(sorted(row))}.")
        return [row] if row[column] is not None and low <= row[column] <= high else []

    return inside


def _filled(text: str, row: Row) -> str:
    try:
        return text.format(**row)
    except (KeyError, IndexError) as missing:
        raise SurgeryError(
            f"The template {text!r} needs column {missing}.", hint=f"Columns: {', '.join(sorted(row))}."
        ) from None
