"""Rows to evaluate on: drawn from tasks, or read from a file; and the answer that a completion states."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError
from surgery.tasks import make_task, marked_answer, numeric_answer


def task_rows(tasks: Sequence[str], n: int = 200, seed: int = 0) -> list[dict[str, Any]]:
    """`n` rows with different prompts of each task, one task after the other; of data sets, the test split.

    Raises `SurgeryError` for an unknown task, or one with fewer prompts.
    """
    rows = []
    for name in tasks:
        task = make_task(name)
        if "split" in task.options:
            task = task.with_options(split="test")
        rows += [example.row(name) for example in task.examples(n, seed)]
    return rows


def file_rows(
    path: str | Path, task: str | None = None, *, n: int | None = None, **templates: str
) -> list[dict[str, Any]]:
    """The first `n` rows of a file; `prompt="{question}"` and so on make columns, as in a recipe's `data`.

    `task` names the verifier of rows that have no column `task`. Raises `SurgeryError` naming the row and the column
    that is wrong.
    """
    from surgery.training.data import rows_of

    source = rows_of({"file": str(Path(path).expanduser()), **templates})
    rows = [source.row(i) for i in range(int(source.size) if n is None else min(n, int(source.size)))]
    for i, row in enumerate(rows):
        for column in ("prompt", "answer"):
            if column not in row:
                hint = f"Make it of the others, as in --{column} '{{{next(iter(row))}}}'."
                raise SurgeryError(f"{path}, row {i}: no column '{column}'; it has {', '.join(row)}.", hint=hint)
        if row.setdefault("task", task) is None:
            raise SurgeryError(f"{path}, row {i}: nothing says how its answer is checked.",
                               hint="Add a column 'task', or name one for all rows: --task gsm8k.")  # fmt: skip
        row["answer"] = str(row["answer"])
        make_task(row["task"])  # a wrong name is told before a model is loaded
    return rows


def stated_answer(completion: str) -> str | None:
    r"""What a completion says the answer is, as majorities count it; None when it says nothing.

    The last `\boxed{...}` or `<answer>`, else the number after `####`, else the text after `#`, else the last number,
    else the text itself.
    """
    if found := re.findall(r"\\boxed\{([^{}]*)\}|<answer>(.*?)</answer>", completion, re.DOTALL):
        return "".join(found[-1]).strip()
    if "#" in completion and "####" not in completion:
        return marked_answer(completion) or None
    number = numeric_answer(completion)
    return completion.strip() or None if number is None else repr(number)
