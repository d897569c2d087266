"""Rows to evaluate on: drawn from tasks, or read from a file; and the answer that a completion states."""

from __future__ import annotations

import json
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
    path: str | Path,
    task: str | None = None,
    *,
    n: int | None = None,
    prompt: str = "prompt",
    answer: str = "answer",
    completion: str = "completion",
) -> list[dict[str, Any]]:
    """The first `n` rows of a JSON-lines file; the named columns become prompt, answer and completion.

    `task` names the verifier of rows that have no column `task`. Raises `SurgeryError` naming the line and the column
    that is wrong.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise SurgeryError(f"There is no file {path}.", hint="--data takes a file of JSON lines.")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or (n is not None and len(rows) >= n):
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SurgeryError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise SurgeryError(f"{path}, line {number}: a {type(row).__name__}; expected an object with columns.")
        for column in (prompt, answer):
            if column not in row:
                raise SurgeryError(f"{path}, line {number}: there is no column '{column}'; it has {', '.join(row)}.",
                                   hint="Name the columns: --prompt-column, --answer-column.")  # fmt: skip
        told = {"prompt": row[prompt], "answer": row[answer], "task": row.get("task", task)}
        if told["task"] is None:
            raise SurgeryError(f"{path}, line {number}: nothing says how answers are checked.",
                               hint="Add a column 'task', or name one for all rows: --task gsm8k.")  # fmt: skip
        make_task(told["task"])  # a wrong name is told before a model is loaded
        rows.append(row | told | ({"completion": row[completion]} if completion in row else {}))
    if not rows:
        raise SurgeryError(f"{path} holds no rows.")
    return rows


def stated_answer(completion: str) -> str | None:
    r"""What a completion says the answer is, as majorities count it; None when it says nothing.

    The last `\boxed{...}` or `<answer>`, else the number after `####`, else the text after `#`, else the last number,
    else the text itself.
    """
    if found := re.findall(r"\\boxed\{([^{}]*)\}|<answer>(.*?)</answer>", completion, re.DOTALL):
        return "".join(found[-1]).strip()
    if "#" in completion and "####" not in completion:
        return marked_answer(completion)
    number = numeric_answer(completion)
    return completion.strip() or None if number is None else repr(number)
