"""Prompts on the command line: a file of lines (.txt) or of rows (.jsonl, .json, .csv, .parquet), or a task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError


def rows(path: Path, n: int | None = None) -> list[dict[str, Any]]:
    """The first `n` rows of a file, each with a `prompt`: a line of a .txt, or the row's column prompt or text.

    Raises `SurgeryError` for a file that is missing or empty, and for rows without a prompt.
    """
    if path.suffix == ".txt":
        if not path.is_file():
            raise SurgeryError(f"There is no file {path}.")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise SurgeryError(f"{path} is no text in UTF-8: {error}.") from error
        found: list[dict[str, Any]] = [{"prompt": line} for line in lines if line.strip()]
    else:
        from surgery.training.data import rows_of

        source = rows_of({"file": str(path.expanduser())})
        found = [dict(source.row(i)) for i in range(int(source.size))]
    if not found:
        raise SurgeryError(f"{path} holds no prompts.")
    for i, row in enumerate(found[:n]):
        if "prompt" not in row and "text" in row:
            row["prompt"] = row["text"]
        if "prompt" not in row:
            raise SurgeryError(f"{path}, row {i}: no column 'prompt' (or 'text'); it has {', '.join(row)}.")
    return found[:n]


def texts(path: Path, n: int | None = None) -> list[Any]:
    """The prompts alone."""
    return [row["prompt"] for row in rows(path, n)]


def pairs(
    clean: Path | None, corrupt: Path | None, task: str | None, n: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of clean and corrupt prompts, pair by pair, with their answers where there are any.

    From two files, or from one whose rows have `corrupt_prompt` (and `corrupt_answer`), or from a task that makes
    such rows. Raises `SurgeryError` when nothing was asked, or the files differ in length.
    """
    if task is not None:
        if clean is not None or corrupt is not None:
            raise SurgeryError("--task makes both prompts: it does not go with --clean or --corrupt.")
        from surgery.tasks import make_task

        both = [example.row(task) for example in make_task(task).examples(n, seed)]
        if "corrupt_prompt" not in both[0]:
            raise SurgeryError(f"The task '{task}' makes no corrupt prompts.",
                               hint="`boxes` does; else give files: --clean and --corrupt.")  # fmt: skip
        return both, [_corrupt(row) for row in both]
    if clean is None:
        raise SurgeryError("Nothing to compare was given.", hint="Name two files, --clean and --corrupt, or a --task.")
    good = rows(clean, n)
    if corrupt is None:
        if any("corrupt_prompt" not in row for row in good):
            raise SurgeryError(f"{clean} has no column 'corrupt_prompt'.", hint="Name a file of them: --corrupt FILE.")
        return good, [_corrupt(row) for row in good]
    bad = rows(corrupt, n)
    if len(good) != len(bad):
        raise SurgeryError(f"{clean} has {len(good)} prompts and {corrupt} has {len(bad)}: they come in pairs.")
    return good, bad


def _corrupt(row: dict[str, Any]) -> dict[str, Any]:
    found = {"prompt": row["corrupt_prompt"]}
    return found | ({"answer": row["corrupt_answer"]} if "corrupt_answer" in row else {})


def answers(found: Sequence[dict[str, Any]], tokenizer: Any, *, first: bool) -> Any:
    """(batch,) the token of each row's answer; None where a row has none. Of several tokens the first, if asked."""
    if not all("answer" in row for row in found):
        return None
    from analysis.metrics import answer_tokens

    return answer_tokens(tokenizer, [str(row["answer"]) for row in found], first=first)
