"""Puzzles on a grid: 4x4 squares to be filled, and shortest paths."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import permutations
from random import Random
from typing import Any

from surgery.errors import SurgeryError
from surgery.tasks.base import Example, Size, bounds, counted, draw, marked_answer, task

SIDE = 4


def is_latin(rows: Sequence[str], blocks: bool) -> bool:
    """Whether every row and column (and, with `blocks`, every 2x2 block) holds each of 1, 2, 3, 4."""
    if len(rows) != SIDE or any(len(row) != SIDE for row in rows):
        return False
    units = [*rows, *map("".join, zip(*rows, strict=True))]
    if blocks:
        units += [rows[r][c : c + 2] + rows[r + 1][c : c + 2] for r in (0, 2) for c in (0, 2)]
    return all(sorted(unit) == list("1234") for unit in units)


def fills(completion: str, row: Mapping[str, Any]) -> bool:
    """Whether what follows the last `#` is a full square that keeps the row's givens: any solution counts."""
    found, givens = (marked_answer(completion) or "").split(";"), row["givens"]
    kept = "".join(found)
    if len(kept) != len("".join(givens)) or not is_latin(found, bool(row["blocks"])):
        return False
    return all(given in ("0", cell) for given, cell in zip("".join(givens), kept, strict=True))


@lru_cache(maxsize=2)
def _squares(blocks: bool) -> dict[str, int]:
    """All 576 latin squares of 4x4, or the 288 whose blocks are right too: 16 digits, and as `_bits`."""
    lines = ["".join(p) for p in permutations("1234")]

    def grown(rows: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if len(rows) == SIDE:
            yield rows
        else:
            for line in lines:
                if all(len({*column}) == len(column) for column in zip(*rows, line, strict=True)):
                    yield from grown((*rows, line))

    return {"".join(square): _bits("".join(square)) for square in grown(()) if is_latin(square, blocks)}


def _bits(cells: str) -> int:
    """Four bits a cell, of which its digit sets one: a square keeps the givens if it has all their bits."""
    return sum(1 << (4 * at + int(digit) - 1) for at, digit in enumerate(cells) if digit != "0")


@task("latin", "fill the blanks (0) of a 4x4 square; one solution", fills)
def latin(rng: Random, *, blanks: Size = (2, 8), blocks: bool = False) -> Example:
    """Every row and column holds 1 to 4; with `blocks` every 2x2 block too (a small sudoku)."""
    count, squares = draw(rng, "blanks", blanks, 1, 10), _squares(bool(blocks))
    names = list(squares)
    while True:
        answer = rng.choice(names)
        shown = answer
        for cell in rng.sample(range(SIDE * SIDE), SIDE * SIDE):
            fewer = f"{shown[:cell]}0{shown[cell + 1 :]}"
            bits = _bits(fewer)
            if sum(square & bits == bits for square in squares.values()) == 1:  # still one solution
                shown = fewer
            if shown.count("0") == count:
                givens, filled = _lines(shown), ";".join(_lines(answer))
                columns = {"givens": givens, "blocks": bool(blocks)}
                return Example(f"g {';'.join(givens)}=", f"#{filled}", filled, count, counted(count, "blank"), columns)


def _lines(cells: str, side: int = SIDE) -> list[str]:
    return [cells[i : i + side] for i in range(0, len(cells), side)]


STEPS = {"d": (1, 0), "l": (0, -1), "r": (0, 1), "u": (-1, 0)}
"""Rows and columns that a letter moves by."""


def _walk(grid: Sequence[str], start: tuple[int, int], path: str) -> tuple[int, int] | None:
    """Where `path` leads from `start`, or None when it runs into a wall, off the grid, or isn't a path."""
    row, column = start
    for letter in path:
        if letter not in STEPS:
            return None
        row, column = row + STEPS[letter][0], column + STEPS[letter][1]
        if not (0 <= row < len(grid) and 0 <= column < len(grid[0])) or grid[row][column] == "x":
            return None
    return row, column


def _place(grid: Sequence[str], letter: str) -> tuple[int, int]:
    return next((r, line.index(letter)) for r, line in enumerate(grid) if letter in line)


def shortest(grid: Sequence[str]) -> str | None:
    """A shortest path from `s` to `e`, first in the order d, l, r, u; None when there is none."""
    start, end = _place(grid, "s"), _place(grid, "e")
    queue, seen = deque([(start, "")]), {start}
    while queue:
        at, path = queue.popleft()
        if at == end:
            return path
        for letter in STEPS:
            to = _walk(grid, at, letter)
            if to is not None and to not in seen:
                seen.add(to)
                queue.append((to, path + letter))
    return None


def walks(completion: str, row: Mapping[str, Any]) -> bool:
    """Whether what follows the last `#` is a path from `s` to `e` as short as the row's: any such path counts."""
    path, grid = marked_answer(completion) or "", row["grid"]
    return len(path) == len(row["answer"]) and _walk(grid, _place(grid, "s"), path) == _place(grid, "e")


@task("path", "a shortest path from s to e through a grid with walls (x), in d, l, r, u", walks)
def path(rng: Random, *, size: Size = (3, 4), steps: Size = (2, 6)) -> Example:
    """`size` rows and columns, three in ten cells a wall; the shortest path takes `steps` steps."""
    low, high = bounds("steps", steps, 1, 60)
    for _ in range(10_000):
        side = draw(rng, "size", size, 2, 12)
        cells = [rng.choices("ox", (7, 3))[0] for _ in range(side * side)]
        start, end = rng.sample(range(side * side), 2)
        cells[start], cells[end] = "s", "e"
        grid = _lines("".join(cells), side)
        found = shortest(grid)
        if found is not None and low <= len(found) <= high:
            label = counted(len(found), "step")
            return Example(f"p {';'.join(grid)}=", f"#{found}", found, len(found), label, {"grid": grid})
    raise SurgeryError(f"No path of {low} to {high} steps was found in a grid of size {size}.")
