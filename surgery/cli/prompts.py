"""Prompts on the command line: a file of lines (.txt) or of rows (.jsonl, .json, .csv, .parquet), or a task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from surgery.cli import frame
from surgery.cli.frame import option
from surgery.errors import SurgeryError

FIGURES = (".png", ".svg", ".pdf")
Metric = Literal["logit_diff", "prob", "log_prob", "kl", "accuracy"]

_PROMPTS = "Prompts, pair by pair"
Clean = Annotated[
    Path | None, option("A line, or a row with `prompt` and `answer`, each.", metavar="FILE", panel=_PROMPTS)
]
Corrupt = Annotated[
    Path | None, option("Likewise; or `corrupt_prompt` in --clean's rows.", metavar="FILE", panel=_PROMPTS)
]
Task = Annotated[str | None, option("A task that makes both (boxes).", panel=_PROMPTS)]
Number = Annotated[int, option("Pairs.", "--n", min=1, panel=_PROMPTS)]
Seed = Annotated[int, option("Of a task's examples.", panel=_PROMPTS)]
Suffix = Annotated[str, option("What both prompts end with, as in '#'.", panel=_PROMPTS)]
First = Annotated[bool, option("Of answers of several tokens take the first.", "--first-token", panel=_PROMPTS)]
Workers = Annotated[int | None, option("Threads of torch.", "--threads", min=1, default="torch's own choice")]
MetricName = Annotated[Metric, option("What is measured of the answer.")]


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


def metric(
    name: Metric, model: Any, tokenizer: Any, batches: list[Any], good: list[Any], bad: list[Any], first: bool
) -> tuple[Any, list[str]]:
    """The metric by its name, and what should be known of it."""
    import torch

    from analysis import metrics
    from surgery.activations import run

    def likeliest(batch: Any) -> Any:
        logits: Any = run(model, batch)[0]
        here = batch.to(logits.device)
        return logits[torch.arange(len(here), device=logits.device), here.last]

    remarks = []
    right, wrong = (answers(rows, tokenizer, first=first) for rows in (good, bad))
    if right is None or (wrong is None and name == "logit_diff"):
        own = [likeliest(batch).argmax(-1).cpu() for batch in batches]
        right, wrong = (own[0] if right is None else right), own[1]
        remarks.append("Rows without answers: the model's own likeliest tokens are taken.")
    if name == "kl":
        return metrics.kl(likeliest(batches[0])), remarks
    if name == "logit_diff":
        same = int((right == wrong).sum())
        if same:
            remarks.append(f"In {frame.count(same, 'pair')} both answers are the same token.")
        return metrics.logit_diff(torch.stack([right, wrong], 1)), remarks
    return getattr(metrics, name)(right), remarks


def checked_outputs(out: Path | None, plot: Path | None, force: bool) -> None:
    """Raises `SurgeryError` for an output that exists (without `force`), and for a figure of no known type."""
    if out is not None and not force:
        taken = [f for f in (out.with_suffix(".json"), out.with_suffix(".safetensors")) if f.exists()]
        if taken:
            raise SurgeryError(f"The output {taken[0]} exists already.", hint="Choose another name, or pass --force.")
    if plot is not None and plot.suffix not in FIGURES:
        raise SurgeryError(f"--plot writes {', '.join(FIGURES)} files, and '{plot}' is none.")
