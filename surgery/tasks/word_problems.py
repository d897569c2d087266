"""Word problems that real models are scored on: GSM8K, SVAMP and MATH, read from files or from the hub.

`gsm8k("test")` lists the problems in their order; the tasks of the same names draw them at random, for training.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from surgery.errors import SurgeryError
from surgery.tasks.base import Example, Verifier, counted, task
from surgery.tasks.hub import hub_rows

_NUMBER = re.compile(r"(?<![\d.])-?\.?\d[\d,]*(?:\.\d+)?")  # no sign right after a digit: "5-2" ends in 2


def numeric_answer(text: str) -> float | None:
    """The number after the last `####`, else the last number of the text, else None. Thousands commas are dropped."""
    _, mark, tail = text.rpartition("####")
    found = _NUMBER.findall(tail) if mark else []
    number = found[0] if found else next(iter(reversed(_NUMBER.findall(text))), None)
    return None if number is None else float(number.replace(",", ""))


def same_number(completion: str, example: Example) -> bool:
    """The verifier of GSM8K and SVAMP: the completion's number equals the answer (to 1e-6)."""
    said, right = numeric_answer(completion), float(example.answer)
    return said is not None and abs(said - right) <= 1e-6 * max(1.0, abs(right))


def same_number_as_row(completion: str, row: Mapping[str, Any]) -> bool | None:
    """`same_number` for rows; None when the row's answer holds no number."""
    right = numeric_answer(str(row["answer"]))
    return None if right is None else same_number(completion, Example("", "", repr(right)))


def same_expression(completion: str, row: Mapping[str, Any]) -> bool | None:
    """Whether the completion's expression equals the row's, by `math-verify`; None when the row's can't be parsed.

    Raises `SurgeryError` when the package is missing.
    """
    try:
        from math_verify import parse
        from math_verify import verify as equal
    except ImportError as error:
        raise SurgeryError(
            "Answers that are expressions are compared by the package `math-verify`, which is not installed.",
            hint="`pip install math-verify`",
        ) from error
    # Its time limits are alarms, which only the main thread may set; elsewhere it must go without.
    limit: Any = 5 if threading.current_thread() is threading.main_thread() else None
    gold = parse(f"\\boxed{{{row['answer']}}}", parsing_timeout=limit)
    if not gold:
        return None
    return bool(equal(gold, parse(completion, parsing_timeout=limit), timeout_seconds=limit))


def gsm8k(split: str = "test", n: int | None = None, *, path: str | Path | None = None) -> list[Example]:
    """The first `n` GSM8K problems (Cobbe et al. 2021, arXiv:2110.14168); responses end in `#### number`.

    Read from `path` (a file, or a folder with `test.jsonl`), else from `$SURGERY_DATA/gsm8k`, else from the hub. The
    calculator marks `<<48/2=24>>` are taken out; their number is the difficulty. Raises `SurgeryError` when the data
    can't be found.
    """
    found = []
    for row in _records(split, path, "gsm8k", f"{split}.jsonl", "openai/gsm8k:main"):
        response, steps = re.sub(r"<<[^>]*>>", "", row["answer"]), row["answer"].count("<<")
        answer = _plain(numeric_answer(response) or 0.0)
        found.append(Example(row["question"], response, answer, steps, counted(steps, "step")))
    return found[:n]


def svamp(
    split: str = "test", n: int | None = None, *, held_out: int = 300, path: str | Path | None = None
) -> list[Example]:
    """The first `n` SVAMP problems (Patel et al. 2021, arXiv:2103.07191); the response is `equation\\n#### number`.

    Read from `path` (a file, or a folder with `SVAMP.json`), else from `$SURGERY_DATA/svamp`, else from the hub. The
    file is one list of 1000: its last `held_out` problems are the test split here, the others the training split. The
    difficulty is the number of operations, the category their kind.
    """
    rows = _records(split, path, "svamp", "SVAMP.json", "ChilleD/SVAMP")
    if path is not None or os.environ.get("SURGERY_DATA"):
        rows = rows[-held_out:] if split == "test" else rows[:-held_out]
    found = []
    for row in rows:
        answer = _plain(float(row["Answer"]))
        equation = re.sub(r"\.0\b", "", row["Equation"]).strip()
        equation = re.sub(r"^\( (.*) \)$", r"\1", equation)
        body = row["Body"].strip()
        prompt = f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {row['Question'].strip()}"
        steps = len(re.findall(r" [-+*/] ", equation))
        found.append(Example(prompt, f"{equation} = {answer}\n#### {answer}", answer, steps, row.get("Type")))
    return found[:n]


def math(split: str = "test", n: int | None = None, *, path: str | Path | None = None) -> list[Example]:
    """The first `n` MATH problems (Hendrycks et al. 2021, arXiv:2103.03874); the response is `\\boxed{answer}`.

    Read from `path` (a Parquet file, or a folder with `test.parquet`), else from `$SURGERY_DATA/math`, else MATH-500
    (Lightman et al. 2023, arXiv:2305.20050), a test split alone, from the hub. The difficulty is the level where the
    data tell it.
    """
    found = []
    for row in _records(split, path, "math", f"{split}.parquet", "HuggingFaceH4/MATH-500"):
        level = re.search(r"\d", str(row.get("level", "")))
        kind = row.get("subject") or row.get("type")
        response = f"\\boxed{{{row['answer']}}}"
        found.append(Example(row["problem"], response, row["answer"], float(level[0]) if level else None, kind))
    return found[:n]


def _records(split: str, path: str | Path | None, folder: str, file: str, hub: str) -> Sequence[dict]:
    """Rows of the file at `path`, of `$SURGERY_DATA/folder/file`, or of the hub's data set where there is a network."""
    if split not in ("train", "test"):
        raise SurgeryError(f"Unknown split '{split}': expected 'train' or 'test'.")
    if path is not None:
        where = Path(path) / file if Path(path).is_dir() else Path(path)
        if not where.is_file():
            raise SurgeryError(f"There is no file {where}.", hint=f"Give a file, or a folder that holds {file}.")
        return _read(where)
    if root := os.environ.get("SURGERY_DATA"):
        where = Path(root) / folder / file
        if not where.is_file():
            raise SurgeryError(f"SURGERY_DATA has no {folder}/{file}: {where} is missing.")
        return _read(where)
    name, _, config = hub.partition(":")
    return hub_rows(name, config or None, split, hint=f"Set SURGERY_DATA to a folder that holds {folder}/{file}.")


def _read(path: Path) -> list[dict]:
    """Rows of a JSON list, of JSON lines, or of Parquet. Raises `SurgeryError` when they can't be read."""
    try:
        if path.suffix == ".parquet":
            try:
                from pyarrow import parquet
            except ImportError as error:
                raise SurgeryError(f"{path} is Parquet.", hint="`pip install pyarrow` reads it.") from error
            return parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines() if line] if path.suffix == ".jsonl" else json.loads(text)
    except (ValueError, OSError) as error:
        raise SurgeryError(f"{path} can't be read: {error}.") from error


def _plain(number: float) -> str:
    """1000000.0 -> "1000000", 0.5 -> "0.5"."""
    return str(int(number)) if number == int(number) else repr(number)


@lru_cache(maxsize=8)
def _problems(load: Callable[..., list[Example]], split: str, path: str | None, _root: str | None) -> list[Example]:
    """Problems read once; `_root` is part of the key, so that another SURGERY_DATA is read again."""
    return load(split, path=path)


def _drawn(load: Callable[..., list[Example]], name: str, summary: str, verifier: Verifier) -> None:
    @task(name, summary, verifier, needs=f"the data set (SURGERY_DATA/{name}, or the hub)")
    def make(rng: Random, *, split: str = "train", path: str | None = None) -> Example:
        return rng.choice(_problems(load, split, path, os.environ.get("SURGERY_DATA")))


_drawn(gsm8k, "gsm8k", "grade-school word problems, worked out", same_number_as_row)
_drawn(svamp, "svamp", "word problems of one or two operations", same_number_as_row)
_drawn(math, "math", "competition problems; answers are expressions", same_expression)
