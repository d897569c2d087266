"""The reward of programs: run the completion and compare what comes out."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from surgery.registry import Registry
from surgery.tasks.sql import run_sql
from surgery.training.rewards.base import REWARDS, Row, rows_of, text_of
from surgery.training.rewards.build import found
from surgery.training.rewards.similarity import common
from surgery.training.rewards.tools import section


class Results(NamedTuple):
    """What a program gave."""

    rows: tuple[tuple[Any, ...], ...]
    ordered: bool = False
    """Whether the order of the rows counts."""


Executor = Callable[[str, Row], Results | None]
EXECUTORS: Registry[Executor] = Registry("executor")
"""(program, row) -> results, None when the program fails."""

_rows = lru_cache(maxsize=4096)(run_sql)  # the gold query of a group is run once


def _orders(query: str) -> bool:
    """Whether the outermost query orders its rows: ORDER BY outside all parentheses."""
    inner = None
    while inner != query:
        inner, query = query, re.sub(r"\([^()]*\)", "", query)
    return re.search(r"\border\s+by\b", query, re.IGNORECASE) is not None


@EXECUTORS.register("sql")
def sql(program: str, row: Row) -> Results | None:
    """The rows of a query on the row's `database` (a script), and on its `second_database` when it has one."""
    query, found = program.strip().rstrip(";").strip(), list[tuple[Any, ...]]()
    for i, script in enumerate((row.get("database") or "", row.get("second_database"))):
        if script is not None:
            rows = _rows(str(script), query)
            if rows is None:
                return None
            found += [(i, *values) for values in rows]
    return Results(tuple(found), _orders(query))


_ARITHMETIC: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def evaluate(tree: ast.AST, names: Row) -> Any:
    """A number from an arithmetic expression over `names`. Raises `ValueError` for anything else."""
    match tree:
        case ast.Expression(body=body):
            return evaluate(body, names)
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _ARITHMETIC[type(op)](evaluate(left, names), evaluate(right, names))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _ARITHMETIC:
            return _ARITHMETIC[type(op)](evaluate(operand, names))
    raise ValueError("not arithmetic")


@EXECUTORS.register("expression")
def expression(program: str, row: Row) -> Results | None:
    """An arithmetic expression's value on each case of the row's `cases`, a list of tables of names (by default one
    empty table)."""
    try:
        tree = ast.parse(program.strip(), mode="eval")
        return Results(tuple((i, evaluate(tree, case)) for i, case in enumerate(row.get("cases") or [{}])))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError, TypeError):
        return None


_READS: dict[Executor, tuple[str, ...]] = {sql: ("database",)}


def agreement(gold: Results, said: Results) -> float:
    """1 for the same rows (in the same order where the gold program orders them), else what they have in common over
    what either has: common rows, or the longest common subsequence."""
    if not gold.rows and not said.rows:
        return 1.0
    both = common(gold.rows, said.rows) if gold.ordered else (Counter(gold.rows) & Counter(said.rows)).total()
    return both / (len(gold.rows) + len(said.rows) - both)


@REWARDS.register("execution")
@dataclass(kw_only=True)
class Execution:
    """1 when the program in the completion gives what the gold program gives, else the overlap of the result rows; 0
    when it fails, None when the gold program does.

    `executor` is `sql` (reads the column `database`), `expression` (reads `cases`), or `module:function` /
    `file.py:function` called as `executor(program, row)`. The program stands between `opening` and `closing`, by
    default it is the whole completion but for a code fence.
    """

    executor: str = "sql"
    gold: str = "answer"
    opening: str = ""
    closing: str = ""
    run: Executor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.run = found(EXECUTORS, self.executor)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the data must have."""
        return (self.gold, *_READS.get(self.run, ()))

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        """One value in [0, 1] per completion."""
        values: list[float | None] = []
        for text, row in zip(map(text_of, completions), rows_of(prompts, columns), strict=True):
            right = None if row.get(self.gold) is None else self.run(str(row[self.gold]), row)
            fenced = re.findall(r"```\w*\s*\n(.*?)```", text, re.DOTALL)
            program = section(text, self.opening, self.closing) if self.opening or not fenced else fenced[-1]
            said = self.run(program, row) if program and right is not None else None
            values.append(None if right is None else 0.0 if said is None else agreement(right, said))
        return values
