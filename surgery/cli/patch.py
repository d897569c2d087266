"""`surgery patch`: which layer, position, head or neuron carries the behaviour?"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from surgery.cli import frame, prompts
from surgery.cli.frame import Force, command, option
from surgery.cli.prompts import Clean, Corrupt, First, MetricName, Number, Seed, Suffix, Task, Workers

if TYPE_CHECKING:
    from analysis.results import Result


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    command(app, "patch")(patch)


Site = Annotated[str, option("resid_pre, resid_mid, resid_post, attn_out, mlp_out, z, q, k, v, pattern, mlp_post.")]
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
    threads: Workers = None,
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
    prompts.checked_outputs(out, plot, force)
    good, bad = prompts.pairs(clean, corrupt, task, n, seed)

    import torch

    from analysis.patching import patch as sweep
    from analysis.plots import save
    from surgery.models import encode, load, no_bars

    if threads is not None:
        torch.set_num_threads(threads)
    with no_bars():
        loaded, tokenizer = load(model, dtype, device)
    batches = [encode(tokenizer, [row["prompt"] + suffix for row in part]) for part in (good, bad)]
    measured, remarks = prompts.metric(metric, loaded, tokenizer, batches, good, bad, first_token)
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
