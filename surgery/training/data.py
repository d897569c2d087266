"""Rows to train on, from a task, a file, the hub or a list; and rows as batches of tokens.

A recipe's `data` is one of these, or a list of them with shares:

    data: {task: chain, terms: [4, 5, 6]}                      # generated without end from the run's seed
    data: {file: problems.jsonl, prompt: "{question}", completion: "{solution}"}
    data: {hub: openai/gsm8k, config: main, split: train, prompt: "{question}", completion: "{answer}"}
    data: [{task: chain, share: 0.75}, {task: copy, share: 0.25}]

    data: {task: chain, transform: corrupt}                    # pairs for DPO: see `surgery.training.transforms`

Files are JSONL, JSON, CSV or Parquet, and .txt, whose rows are pieces of some 4,000 characters as `text`. `prompt`,
`completion`, `chosen`, `rejected`, `answer` and `text` may be templates over the columns; without them columns of these
names are taken as they are. All other columns reach the reward functions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

from surgery.errors import SurgeryError
from surgery.models import encoded_prompts, pad_id, tokenized
from surgery.registry import nearest
from surgery.tasks.hub import hub_rows
from surgery.training import transforms
from surgery.training.batch import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgery.tasks import Task

Row = dict[str, Any]
TEMPLATES = ("prompt", "completion", "chosen", "rejected", "rationale", "answer", "text")


class Rows(Protocol):
    """A data set: `row(i)` is a pure function of i; `size` is how many there are (infinity for generated ones)."""

    @property
    def size(self) -> float:
        """Number of rows."""

    @property
    def columns(self) -> set[str]:
        """Names of the columns that every row has."""

    def row(self, index: int) -> Row:
        """One row, by index below `size`."""


class ListRows:
    """Rows in memory."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], name: str = "the data") -> None:
        if not rows:
            raise SurgeryError(f"{name} has no rows.")
        self.rows = [dict(row) for row in rows]
        self.size: float = len(self.rows)
        self.columns = set.intersection(*(set(row) for row in self.rows))

    def row(self, index: int) -> Row:
        """A copy of row `index`."""
        return dict(self.rows[index])


class TaskRows:
    """A task's examples without end; row i of seed s is always the same."""

    size = math.inf

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.seed = task, seed
        self.columns = set(self.row(0))

    def row(self, index: int) -> Row:
        """Example `index` of the stream."""
        return self.task.row(self.seed, index)


class TransformedRows:
    """Rows of generated data, each made into another: row i from (row i, seed, i) alone."""

    size = math.inf

    def __init__(self, rows: Rows, transform: transforms.Transform, seed: int) -> None:
        self.rows, self.transform, self.seed = rows, transform, seed
        self.columns = set(self.row(0))

    def row(self, index: int) -> Row:
        """Row `index`, transformed. Raises `SurgeryError` when that isn't exactly one row."""
        found = transforms.applied(self.transform, self.rows.row(index), Random(f"{self.seed}/transform/{index}"))
        if len(found) != 1:
            raise SurgeryError(
                f"A transform made {len(found)} rows of one; generated data need exactly one.",
                hint="Filter data of known size: a file, or a list of rows.",
            )
        return found[0]


class MixedRows:
    """Several data sets: an index belongs to one of them, drawn by share, and to its row of that number, or of files to
    one that is drawn.
    """

    size = math.inf

    def __init__(self, parts: Sequence[Rows], shares: Sequence[float], seed: int) -> None:
        self.parts, self.shares, self.seed = list(parts), list(shares), seed
        self.columns = set.intersection(*(set(part.columns) for part in parts))

    def row(self, index: int) -> Row:
        """Row `index`: which part, and which of its rows, follow from (seed, index)."""
        rng = Random(f"{self.seed}/mix/{index}")
        part = rng.choices(self.parts, self.shares)[0]
        return part.row(index if part.size == math.inf else rng.randrange(int(part.size)))


class PartOfRows:
    """Of rows of known number the last of every so many, or with `rest` all the others."""

    def __init__(self, rows: Rows, every: int, rest: bool) -> None:
        self.rows, self.rest, self.columns = rows, rest, rows.columns
        self.every = max(2, min(every, int(rows.size)))  # of few rows one
        taken = int(rows.size) // self.every
        self.size: float = rows.size - taken if rest else taken

    def row(self, index: int) -> Row:
        """Row `index` of the part."""
        return self.rows.row(index + index // (self.every - 1) if self.rest else (index + 1) * self.every - 1)


def trained_on(rows: Rows, every: int) -> Rows:
    """Of several data mixed all but every so manieth row of a file, at least one; other data are given back."""
    if not isinstance(rows, MixedRows):
        return rows
    parts = [part if part.size == math.inf else PartOfRows(part, every, rest=True) for part in rows.parts]
    return MixedRows(parts, rows.shares, rows.seed)


def kept_out(rows: Rows, others: Rows, every: int) -> Rows:
    """What `trained_on` leaves out of `rows`. What has no end has rows of another seed instead: those of `others`.

    A file of a single row is trained on, and never kept out. Raises `SurgeryError` where nothing else is mixed.
    """
    if not (isinstance(rows, MixedRows) and isinstance(others, MixedRows)):
        return others
    pairs = zip(rows.parts, others.parts, strict=True)
    cut = [other if part.size == math.inf else PartOfRows(part, every, rest=False) for part, other in pairs]
    there = [(part, share) for part, share in zip(cut, rows.shares, strict=True) if part.size]
    if not there:
        raise SurgeryError("Each of the mixed data is a single row: none is left to evaluate on.",
                           hint="Give more rows.")  # fmt: skip
    found = MixedRows([part for part, _ in there], [share for _, share in there], others.seed)
    found.columns = rows.columns
    return found


def rows_of(written: Any, seed: int = 0) -> Rows:
    """The rows that a recipe's `data` names. Raises `SurgeryError` for unknown keys, files and columns."""
    if hasattr(written, "row") and hasattr(written, "size"):
        return written
    if isinstance(written, str):
        return rows_of({"file": written} if Path(written).suffix else {"task": written}, seed)
    if isinstance(written, Mapping):
        return _one(dict(written), seed)
    if hasattr(written, "row") and hasattr(written, "make"):
        return TaskRows(written, seed)
    if not written:
        raise SurgeryError("`data` is empty.", hint="data: {task: chain}")
    if not any(isinstance(entry, str) or _is_source(entry) for entry in written):
        return ListRows(written)
    entries = [{"task": e} if isinstance(e, str) else dict(e) for e in written]
    shares = [float(entry.pop("share", 1.0)) for entry in entries]
    return MixedRows([_one(entry, seed) for entry in entries], shares, seed)


def _is_source(entry: Mapping[str, Any]) -> bool:
    """Whether a mapping names data rather than being a row; rows of a task have its name beside their prompt."""
    return bool({"file", "hub"} & set(entry)) or ("task" in entry and "prompt" not in entry)


def _one(entry: Row, seed: int) -> Rows:
    sources = {"task": _task_rows, "file": _file_rows, "hub": _hub_rows}
    named = [key for key in sources if key in entry]
    if len(named) != 1:
        raise SurgeryError(
            f"`data` names {' and '.join(named) or 'none'} of task, file and hub: expected one.",
            hint=nearest(next(iter(entry), ""), sources),
        )
    transform = entry.pop("transform", None)
    found = sources[named[0]](entry.pop(named[0]), entry, seed)
    return found if transform is None else transformed(found, transform, seed)


def transformed(rows: Rows, transform: Any, seed: int = 0) -> Rows:
    """Rows after a transform (`surgery.training.transforms`), by its words or as a callable (row, rng) -> row(s)."""
    made = transforms.parse(transform)
    if rows.size == math.inf:
        return TransformedRows(rows, made, seed)
    each = (transforms.applied(made, rows.row(i), Random(f"{seed}/transform/{i}")) for i in range(int(rows.size)))
    return ListRows([row for part in each for row in part], "After its transform the data set")


def _task_rows(name: str, options: Row, seed: int) -> Rows:
    from surgery.tasks import make_task

    return TaskRows(make_task(name, **options), seed)


def _file_rows(name: str, options: Row, seed: int) -> Rows:
    path = Path(name)
    if not path.is_file():
        raise SurgeryError(f"There is no data file {path}.",
                           hint="It is looked up beside the recipe, then in the working folder.")  # fmt: skip
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        elif path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix in (".csv", ".parquet"):
            import pandas as pd

            frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
            rows = frame.to_dict("records")
        elif path.suffix == ".txt":
            rows = [{"text": piece} for piece in _pieces(path.read_text(encoding="utf-8"))]
        else:
            raise SurgeryError(f"{path}: expected .jsonl, .json, .csv, .parquet or .txt.")
    except ValueError as error:
        raise SurgeryError(f"{path} can't be read: {error}.") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SurgeryError(f"{path} is not a list of rows.")
    return ListRows(_filled(rows, options, path.name), path.name)


def _pieces(text: str, size: int = 4000) -> Iterator[str]:
    """A text in pieces that end with a line, each of `size` characters or a line more."""
    held: list[str] = []
    for line in text.splitlines(keepends=True):
        held.append(line)
        if sum(map(len, held)) >= size:
            yield "".join(held)
            held = []
    if held:
        yield "".join(held)


def _hub_rows(name: str, options: Row, seed: int) -> Rows:
    config, split = options.pop("config", None), options.pop("split", "train")
    return ListRows(_filled(hub_rows(name, config, split), options, name), name)


def _filled(rows: list[Row], templates: Row, name: str) -> list[Row]:
    """Columns made from templates: `prompt: "{Body} {Question}"`."""
    for key in templates:
        if key not in TEMPLATES:
            raise SurgeryError(f"`data` has no key '{key}'.", hint=nearest(key, TEMPLATES))
    for i, row in enumerate(rows):
        try:
            row |= {key: template.format(**row) for key, template in templates.items()}
        except (KeyError, IndexError) as missing:
            raise SurgeryError(
                f"{name}, row {i}: the template needs column {missing}.", hint=f"Columns: {', '.join(sorted(row))}."
            ) from None
    return rows


# ---- rows as tokens ------------------------------------------------------------------------------------------------


def completion_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of one completion: see `encoded_completions`."""
    return encoded_completions(tokenizer, [text])[0]


def encoded_completions(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Each completion's tokens and the end mark. Tokenised apart from the prompt: the boundary stays where it is."""
    if tokenizer.eos_token_id is None:
        raise SurgeryError("The tokenizer has no end-of-sequence token: a completion could not be ended.")
    return [[*ids, tokenizer.eos_token_id] for ids in tokenized(tokenizer, texts, special=False)]


def demonstrations(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, chat: bool = False, max_length: int = 0, **more: Any
) -> Batch:
    """Prompt and completion of each row; `weight` and `max_length` (tokens kept from the start) are optional.

    An empty prompt is the beginning-of-sequence token, so that plain text can be learned whole.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    prompts = [ids or [start] for ids in encoded_prompts(tokenizer, [row["prompt"] for row in rows], chat)]
    found = encoded_completions(tokenizer, [row["completion"] for row in rows])
    masks = None
    if max_length:  # a row whose prompt alone is as long as that keeps one token, which doesn't count
        masks = [[float(len(p) + i < max_length) for i in range(len(c))] for p, c in zip(prompts, found, strict=True)]
        kept = [max(1, max_length - len(p)) for p in prompts]
        prompts = [p[:max_length] for p in prompts]
        found = [c[:n] for c, n in zip(found, kept, strict=True)]
        masks = [m[:n] for m, n in zip(masks, kept, strict=True)]
    batch = Batch.of(prompts, found, pad=pad_id(tokenizer), rows=rows, masks=masks, kind="demonstrations", **more)
    if any("weight" in row for row in rows):
        import torch

        batch["weight"] = torch.tensor([float(row.get("weight", 1.0)) for row in rows])
    return batch


def pairs(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, chat: bool = False, max_length: int = 0, **more: Any
) -> Batch:
    """Chosen and rejected completion of each row, next to each other: groups of two."""
    each = [{**row, "completion": row[side]} for row in rows for side in ("chosen", "rejected")]
    batch = demonstrations(each, tokenizer, chat=chat, max_length=max_length, **more)
    batch.kind, batch.group = "pairs", 2
    return batch
