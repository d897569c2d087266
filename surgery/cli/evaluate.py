"""`surgery eval`: how good is a model, and is it better than another?"""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.cli import composed, frame, models
from surgery.cli.composed import (
    DRAWN,
    BatchSize,
    Chat,
    ChatFor,
    Device,
    Dtype,
    Expr,
    Foreign,
    MaxNewTokens,
    Missing,
    Model,
    Named,
    Scaled,
    TokenFilter,
)  # fmt: skip
from surgery.cli.frame import Force, command, option
from surgery.errors import SurgeryError
from surgery.registry import nearest

if TYPE_CHECKING:
    from analysis.scores import Scores

FIGURES = (".png", ".svg", ".pdf")


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    command(app, "eval")(evaluate)


def _complete_task(incomplete: str) -> list[str]:
    from surgery.tasks import TASKS

    return [name for name in TASKS if name.startswith(incomplete)]


Task = Annotated[
    list[str] | None,
    option("What is asked; repeatable. With --data: how answers are checked.", autocompletion=_complete_task),
]
Number = Annotated[int, option("Examples of each task (or rows of the file).", "--n", min=1)]
Seed = Annotated[int, option("Of the examples, and of the samples.")]
By = Annotated[str | None, option("A line for each: task, category, difficulty.", metavar="COLUMN")]
Against = Annotated[
    str | None, option("Another model (or formula) on the same examples: differences are paired.", metavar="MODEL")
]
Likelihood = Annotated[bool, option("Log-likelihood and perplexity of the right answers too.", "--likelihood")]
Out = Annotated[Path | None, option("Keep every example's result there.", "--out", "-o", metavar="DIR")]
Plot = Annotated[Path | None, option("Draw a figure.", metavar="FILE.png")]

_FILE = "Examples from a file"
Data = Annotated[Path | None, option("Rows (.jsonl, .json, .csv, .parquet).", panel=_FILE, metavar="FILE")]
Prompt = Annotated[str | None, option("As in '{question}'.", panel=_FILE, metavar="TEMPLATE", default="its column")]
Answer = Annotated[str | None, option("As in '{solution}'.", panel=_FILE, metavar="TEMPLATE", default="its column")]
Completion = Annotated[str | None, option("What --likelihood scores.", panel=_FILE, metavar="TEMPLATE",
                                          default="its column")]  # fmt: skip

Samples = Annotated[int | None, option("Completions of each prompt.", panel=DRAWN, min=1, default="one, greedy")]
Temperature = Annotated[float, option("At which they are drawn.", panel=DRAWN, min=0.01)]
PassAt = Annotated[str, option("Estimate pass@k, as in 1,4,16.", panel=DRAWN, metavar="K,...", default="none")]
Majority = Annotated[bool, option("Majority votes maj@k too.", "--majority", panel=DRAWN)]


def evaluate(
    model: Model = None,
    expr: Expr = None,
    named: Named = None,
    task: Task = None,
    n: Number = 200,
    seed: Seed = 0,
    by: By = None,
    against: Against = None,
    likelihood: Likelihood = False,
    data: Data = None,
    prompt: Prompt = None,
    answer: Answer = None,
    completion: Completion = None,
    samples: Samples = None,
    temperature: Temperature = 1.0,
    pass_at: PassAt = "",
    majority: Majority = False,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 128,
    chat: Chat = False,
    chat_for: ChatFor = None,
    filter: TokenFilter = None,
    scaled: Scaled = None,
    missing: Missing = "mask",
    foreign: Foreign = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    out: Out = None,
    plot: Plot = None,
    force: Force = False,
) -> None:
    """Score a model on tasks whose answers are checked, greedily or over many samples; against another model, too.

    Intervals are 95 %. Of data sets (gsm8k, svamp, math) the test split is asked. reasoning_gym:NAME is a task as well.

    A formula of several models is asked as one model is. --filter is the first one's; what is said of names
    (--chat-for, --scaled) holds for --against too.

    \b
    Examples:
    surgery eval tiny-chain --task chain --task copy --against tiny-base
    surgery eval tiny-chain --task chain --samples 16 --pass-at 1,4,16 --majority --by difficulty --plot chain.png
    surgery eval MODEL --task gsm8k --chat --n 100 --likelihood -o scores
    surgery eval --expr 'large + 1.0*(tuned - small)' --model large=tiny-base --model tuned=tiny-small-chain
        --model small=tiny-small-base --task chain --against large
    surgery eval MODEL --data problems.jsonl --prompt '{question}' --answer '{solution}' --task gsm8k
    """
    began = time.perf_counter()
    if out is not None and out.exists() and not force:
        raise SurgeryError(f"The output {out} exists already.", hint="Choose another folder, or pass --force.")
    if plot is not None and plot.suffix not in FIGURES:
        raise SurgeryError(f"--plot writes {', '.join(FIGURES)} files, and '{plot}' is none.")
    templates = {"prompt": prompt, "answer": answer, "completion": completion}
    rows = _rows(task or [], n, seed, data, {k: v for k, v in templates.items() if v is not None})
    ks = _numbers(pass_at)
    given = models.named(named or [], "As in --model large=DIR.")
    settings = composed.Settings(chat, chat_for or [], scaled or [], dtype, device, filter, missing, foreign or [])
    compositions = [composed.composition(model, expr, given)]
    if against is not None:
        compositions.append(composed.composition(against, None, given))
    composed.checked(compositions, given, settings)
    if by is None and len({row["task"] for row in rows}) > 1:
        by = "task"

    from analysis.evaluate import labels_of
    from analysis.scores import score
    from surgery.models import located

    if by is not None and by not in labels_of(rows):
        raise SurgeryError(f"The examples have no column '{by}' to group by.", hint=nearest(by, labels_of(rows)))
    for each in compositions:
        for spec in each.models.values():
            located(spec)  # before anything is asked

    found: dict[str, Scores] = {}
    for i, label in enumerate(composed.labels(compositions)):
        if i:
            settings = replace(settings, filter=None)
        with (
            composed.evaluated(compositions[i], given, settings) as (loaded, tokenizer, style),
            frame.progress(f"Asking {label}") as advance,
        ):
            found[label] = score(
                loaded, rows, tokenizer=tokenizer, samples=samples, temperature=temperature, seed=seed, pass_at=ks,
                majority=majority, likelihood=likelihood, chat=style, max_new_tokens=max_new_tokens,
                batch_size=batch_size, progress=advance,
            )  # fmt: skip
        del loaded
    ours, *other = found.values()
    told = {"model": compositions[0].text, "models": compositions[0].models, "seed": seed, **ours.summary(by)}
    if against is not None:
        differences = {name: each.to_dict() for name, each in ours.against(other[0]).items()}
        told["against"] = {"model": against, **other[0].summary(by), "difference": differences}
    written = _written(found, by, out, plot)
    told |= {"written": list(map(str, written)), "seconds": round(time.perf_counter() - began, 2)}
    frame.notes(_remarks(found, by))
    closing = f"Done in {frame.seconds(told['seconds'])}."
    if written:
        closing += " Written: " + ", ".join(map(str, written))
    frame.result(told, *([] if frame.STATE.json or frame.STATE.quiet else [_table(found, by)]), closing)


def _rows(tasks: list[str], n: int, seed: int, data: Path | None, templates: dict[str, str]) -> list[dict[str, Any]]:
    from analysis.rows import file_rows, task_rows

    if data is not None:
        if len(tasks) > 1:
            raise SurgeryError(f"--data is checked by one task, and {len(tasks)} were named.")
        return file_rows(data, tasks[0] if tasks else None, n=n, **templates)
    if templates:
        raise SurgeryError(f"--{next(iter(templates))} goes with --data.")
    if not tasks:
        raise SurgeryError("Nothing was asked.", hint="Name a task (--task chain), or a file of examples (--data).")
    return task_rows(tasks, n, seed)


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise SurgeryError(f"--pass-at takes whole numbers, and '{text}' is not that.", hint="As in 1,4,16.") from None


def _written(found: dict[str, Scores], by: str | None, out: Path | None, plot: Path | None) -> list[Path]:
    written: list[Path] = []
    if out is not None:
        several = len(found) > 1
        for label, scores in found.items():
            written += scores.save(out / re.sub(r"[^\w.+() -]", "-", label) if several else out)
    if plot is not None:
        from analysis.plots import save
        from analysis.scores import plot as draw

        written.append(save(draw(found, by or "task"), plot))
    return written


def _remarks(found: dict[str, Scores], by: str | None) -> list[str]:
    """What makes the numbers mean less than they seem to."""
    remarks = []
    if by == "difficulty" and len(set(next(iter(found.values())).accuracy.columns["task"])) > 1:
        remarks.append("difficulty means something within one task only.")
    for label, scores in found.items():
        cut, unread = scores.summary()["truncated"], scores.accuracy.meta["unread"]
        if cut > 0.5:
            remarks.append(f"{label}: {cut:.0%} of the completions were cut off: raise --max-new-tokens.")
        if scores.perplexity == float("inf"):
            remarks.append(f"{label}: the filter forbids a token of some right answer, whose probability is 0.")
        if unread:
            remarks.append(f"{label}: {frame.count(unread, 'row')} left out, whose answer can't be read.")
    return remarks


def _table(found: dict[str, Scores], by: str | None) -> Any:
    """A section for each group and one for all, a line for each measure; of two models, both and their difference."""
    from rich.table import Table

    ours, *others = found.values()
    # One sample is the accuracy again, and likelihood is told as perplexity.
    measures = [name for name in ours.results if name not in ("pass@1", "maj@1", "log-likelihood")]
    several = len(measures) > 1 or ours.perplexity is not None
    table = Table(title=None if several else measures[0], caption="in brackets: 95 % intervals")
    table.add_column(by or "")
    for word in ["n", *(["measure"] if several else []), *found, *(["difference", "p"] if others else [])]:
        table.add_column(word, justify="left" if word == "measure" else "right")
    groups = [(each.by(by) if by is not None else {}) | {"all": each} for each in found.values()]
    for group in groups[0]:
        parts = [each[group] for each in groups]
        differences = parts[0].against(parts[1]) if others else {}
        for i, name in enumerate(measures):
            cells = [str(group), f"{len(parts[0].accuracy):,}"] if i == 0 else ["", ""]
            cells += [name] if several else []
            cells += [_share(part.results[name]) for part in parts]
            if others:
                each = differences[name]
                cells += [f"{each.difference:+.3f} [{each.low:+.3f}, {each.high:+.3f}]", f"{each.p_value:.2g}"]
            table.add_row(*cells)
        if ours.perplexity is not None:
            cells = ["", "", "perplexity", *(f"{part.perplexity:.4g}" for part in parts)]
            table.add_row(*cells, *(["", f"{differences['log-likelihood'].p_value:.2g}"] if others else []))
        if several or group == list(groups[0])[-2:][0]:
            table.add_section()
    return table


def _share(result: Any) -> str:
    low, high = result.interval()
    return f"{result.mean:.3f} [{low:.3f}, {high:.3f}]"
