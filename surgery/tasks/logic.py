"""Small satisfiability problems: our own in the tiny family's characters, and those of the package `satquest`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from random import Random
from typing import Any

from surgery.errors import SurgeryError
from surgery.tasks.base import Example, Size, bounds, counted, draw, marked_answer, task

Clauses = Sequence[Sequence[int]]
"""Conjunctive normal form as DIMACS has it: 3 is the third variable, -3 its negation."""


def models(clauses: Clauses, variables: int) -> Iterator[tuple[bool, ...]]:
    """All assignments that satisfy every clause, by trying each of 2^variables."""
    for values in product((True, False), repeat=variables):
        if all(any(values[abs(literal) - 1] == (literal > 0) for literal in clause) for clause in clauses):
            yield values


def satisfies(completion: str, row: Mapping[str, Any]) -> bool:
    """Whether what follows the last `#` satisfies the row's clauses (any way counts), or is `no` where nothing does."""
    said, n = (marked_answer(completion) or "").replace(" ", ""), row["variables"]
    if said == "no" or row["answer"] == "no":
        return said == row["answer"]
    literals = re.findall(r"-?[a-z]", said)
    if "".join(literals) != said or [literal[-1] for literal in literals] != list(_letters(n)):
        return False
    signs = [not literal.startswith("-") for literal in literals]
    return all(any(signs[abs(literal) - 1] == (literal > 0) for literal in clause) for clause in row["clauses"])


def _letters(n: int) -> str:
    return "abcdefghijklmnop"[:n]


def _formula(rng: Random, variables: int, clauses: int, width: int) -> list[list[int]]:
    """Random clauses of `width` different variables."""
    return [
        [v * rng.choice((1, -1)) for v in sorted(rng.sample(range(1, variables + 1), width))] for _ in range(clauses)
    ]


@task("sat", "an assignment that satisfies all clauses, or `no`", satisfies)
def sat(rng: Random, *, variables: Size = (3, 4), clauses: Size = (3, 8), width: Size = 2) -> Example:
    """`v -ab;a-c;bc=` may be answered `#abc`: a, b and c are true. Clauses are of `width` variables.

    Half of the formulas are satisfiable, wherever the numbers of variables and clauses allow both.
    """
    (low, high), k = bounds("variables", variables, 2, 12), draw(rng, "width", width, 1, 12)
    if k > high:
        raise SurgeryError(f"Option 'width' is {k}, but there are {high} variables.", hint="Use narrower clauses.")
    n = rng.randint(max(low, k), high)
    count, wanted = draw(rng, "clauses", clauses, 1, 60), rng.random() < 0.5
    for _ in range(20):
        formula = _formula(rng, n, count, k)
        found = next(models(formula, n), None)
        if (found is not None) == wanted:
            break
    names = _letters(n)
    shown = ";".join("".join(f"{'-' if v < 0 else ''}{names[abs(v) - 1]}" for v in clause) for clause in formula)
    answer = (
        "no" if found is None else "".join(f"{'' if v else '-'}{name}" for v, name in zip(found, names, strict=True))
    )
    columns = {"variables": n, "clauses": formula, "satisfiable": found is not None}
    label = f"{counted(n, 'variable')}, {counted(count, 'clause')}"
    return Example(f"v {shown}=", f"#{answer}", answer, n + count, label, columns)


PROBLEMS = ("SATDP", "SATSP", "MaxSAT", "MCS", "MUS")
QUESTIONS = ("math", "dimacs", "story", "dualstory")


def checked(completion: str, row: Mapping[str, Any]) -> bool | None:
    """Whether the last string of 0s and 1s in the completion solves the row's problem, by satquest's own check."""
    found = re.findall(r"(?<![0-9])[01]+(?![0-9])", completion)
    problem = _problem(row["problem"], row["clauses"])
    return bool(found) and bool(problem.check(found[-1]))


@task("satquest", "a problem of the package satquest, answered by 0s and 1s", checked, needs="the package satquest")
def satquest(
    rng: Random, *, variables: Size = (3, 5), clauses: Size = (6, 24), problem: str = "SATSP", question: str = "math"
) -> Example:
    """SATQuest (arXiv:2509.00930). `problem` is SATDP (is there an assignment), SATSP (which), MaxSAT, MCS or MUS.

    `question` is the way it is told: math, dimacs, story or dualstory. Half of the SATDP formulas are satisfiable.
    """
    for option, value, valid in (("problem", problem, PROBLEMS), ("question", question, QUESTIONS)):
        if value not in valid:
            raise SurgeryError(f"Option '{option}' is {value!r}, expected one of {', '.join(valid)}.")
    wanted = problem == "SATSP" or (problem == "SATDP" and rng.random() < 0.5)
    for _ in range(1000):
        n = draw(rng, "variables", variables, 3, 12)
        formula = _formula(rng, n, draw(rng, "clauses", clauses, 1, 100), 3)
        used = {abs(v) for clause in formula for v in clause}
        if len(used) == n and (next(models(formula, n), None) is not None) == wanted:
            break
    else:
        kind = "satisfiable" if wanted else "unsatisfiable"
        raise SurgeryError(f"No {kind} formula of {variables} variables and {clauses} clauses was found for {problem}.")
    posed = _problem(problem, formula)
    from satquest import create_question

    prompt, answer = posed.accept(create_question(question)), str(posed.solution)
    columns = {"clauses": formula, "problem": problem, "satisfiable": wanted}
    label = f"{problem}, {counted(n, 'variable')}"
    return Example(prompt, answer, answer, n + len(formula), label, columns)


def _problem(kind: str, clauses: Clauses) -> Any:
    """Satquest's problem object. Raises `SurgeryError` when the package is missing."""
    try:
        from satquest import CNF, create_problem
    except ImportError as error:
        raise SurgeryError(
            "The task 'satquest' needs the package satquest.",
            hint="`pip install python-sat && pip install --no-deps satquest` (its own pin of python-sat is an old one)",
        ) from error
    return create_problem(kind, CNF(clauses=[list(clause) for clause in clauses]))
