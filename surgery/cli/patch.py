"""`surgery patch`: which layer, position, head or neuron carries the behaviour?"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from surgery.cli import frame, prompts
from surgery.cli.frame import Force, Threads, command, option
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from analysis.results import Result

FIGURES = (".png", ".svg", ".pdf")
Metric = Literal["logit_diff", "prob", "log_prob", "kl", "accuracy"]


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    command(app, "patch")(patch)


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
Site = Annotated[str, option("resid_pre, resid_mid, resid_post, attn_out, mlp_out, z, q, k, v, pattern, mlp_post.")]
MetricName = Annotated[Metric, option("What is measured of the answer.")]
Noising = Annotated[bool, option("Corrupt activations into the clean run, not clean into corrupt.", "--noising")]
By = Annotated[Literal["position", "all"] | None, option("A cell a position, or all at once.",
                                                         default="position in the stream, all for heads")]  # fmt: skip
Top = Annotated[int, option("Cells in the table.", min=1)]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], option("Type of its numbers.")]
Device = Annotated[str, option("Where it runs: cpu, cuda, ...")]
Budget = Annotated[int, option("Memory beside the model, in MB.", min=1)]
Out = Annotated[Path | None, option("Keep every cell of every pair there.", "--out", "-o", metavar="FILE")]
Plot = Annotated[Path | None, option("Draw the map.", metavar="FILE.png")]


def patch(
    model: Annotated[str, typer.Argument(help="A folder, base+adapter, a hub name, or a name of the zoo.")],
    clean: Clean = None,
    corrupt: Corrupt = None,
    task: Task = None,
    n: Number = 32,
    seed: Seed = 0,
    suffix: Suffix = "",
    first_token: First = False,
    site: Site = "resid_pre",
    metric: MetricName = "logit_diff",
    noising: Noising = False,
    by: By = None,
    top: Top = 10,
    budget: Budget = 1024,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    out: Out = None,
    plot: Plot = None,
    force: Force = False,
) -> None:
    """Patch activations of one run into another, every cell of a site, and say which bring the answer back.

    Rows without answers are asked about the model's own: the likeliest token after each prompt.

    \b
    Examples:
    surgery patch tiny-boxes --task boxes --suffix '#' --site resid_pre --plot boxes.png
    surgery patch MODEL --clean clean.txt --corrupt corrupt.txt --site z -o heads
    surgery patch MODEL --clean pairs.jsonl --site attn_out --noising
    """
    began = time.perf_counter()
    _checked_outputs(out, plot, force)
    good, bad = prompts.pairs(clean, corrupt, task, n, seed)

    import torch

    from analysis.patching import patch as sweep
    from analysis.plots import save
    from surgery.models import encode, load, no_bars

    torch.set_num_threads(frame.threads(threads)["threads"])
    with no_bars():
        loaded, tokenizer = load(model, dtype, device)
    batches = [encode(tokenizer, [row["prompt"] + suffix for row in part]) for part in (good, bad)]
    measured, remarks = _metric(metric, loaded, tokenizer, batches, good, bad, first_token)
    with frame.progress("Patching") as advance:
        found = sweep(
            loaded, batches[0], batches[1], measured, site, direction="noising" if noising else "denoising", by=by,
            tokenizer=tokenizer, budget=budget << 20, progress=advance,
        )  # fmt: skip
    shown = found if metric in ("kl", "accuracy") else found.normalized()
    written = []
    if out is not None:
        written.append(found.save(out))
    if plot is not None:
        written.append(save(shown.plot(), plot))
    rows = _rows(shown, top)
    told: dict[str, Any] = {"model": model, "site": site, "metric": metric, "direction": found.meta["direction"],
            "n": len(found), "clean": _mean(found, "clean"), "corrupt": _mean(found, "corrupt"), "top": rows,
            "mean": shown.mean.tolist(), "written": list(map(str, written)),
            "seconds": round(time.perf_counter() - began, 2)}  # fmt: skip
    frame.notes(remarks)
    closing = f"{frame.count(len(found), 'pair')} in {frame.seconds(told['seconds'])}; "
    closing += f"{metric}: clean {told['clean']:.3g}, corrupt {told['corrupt']:.3g}."
    if written:
        closing += " Written: " + ", ".join(map(str, written))
    frame.result(told, *([] if frame.STATE.json or frame.STATE.quiet else [_table(shown, rows)]), closing)


def _checked_outputs(out: Path | None, plot: Path | None, force: bool) -> None:
    if out is not None and not force:
        taken = [f for f in (out.with_suffix(".json"), out.with_suffix(".safetensors")) if f.exists()]
        if taken:
            raise SurgeryError(f"The output {taken[0]} exists already.", hint="Choose another name, or pass --force.")
    if plot is not None and plot.suffix not in FIGURES:
        raise SurgeryError(f"--plot writes {', '.join(FIGURES)} files, and '{plot}' is none.")


def _metric(
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
    right, wrong = (prompts.answers(rows, tokenizer, first=first) for rows in (good, bad))
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


def _mean(found: Result, column: str) -> float:
    return sum(found.columns[column]) / len(found)


def _rows(shown: Result, top: int) -> list[dict[str, Any]]:
    """The cells with the greatest effect, with their intervals."""
    import numpy as np

    low, high = shown.interval()
    axes = list(shown.axes.items())[1:]
    order = np.argsort(-np.abs(shown.mean), axis=None, kind="stable")[:top]
    rows = []
    for cell in order.tolist():
        at = np.unravel_index(cell, shown.mean.shape)
        row = {name: labels[i] for (name, labels), i in zip(axes, at, strict=True)}
        rows.append(row | {"mean": float(shown.mean[at]), "low": float(low[at]), "high": float(high[at])})
    return rows


def _table(shown: Result, rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title=shown.name, caption="largest first; in brackets: 95 % intervals")
    axes = list(shown.axes)[1:]
    for axis in axes:
        table.add_column(axis, justify="right")
    table.add_column(shown.name, justify="right")
    ticks = dict(zip(shown.axes.get("position", ()), shown.meta.get("ticks", {}).get("position", ()), strict=False))
    for row in rows:
        cells = [str(ticks.get(row[axis], row[axis]) if axis == "position" else row[axis]) for axis in axes]
        table.add_row(*cells, f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]")
    return table
