"""`surgery tuco` and `surgery diff`: what fine-tuning does to prompts, and what it changed."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from surgery.cli import frame, prompts
from surgery.cli.frame import Force, command, option
from surgery.cli.prompts import Workers
from surgery.errors import SurgeryError


def register(app: typer.Typer) -> None:
    """Adds the commands to `app`."""
    command(app, "tuco")(tuco)
    command(app, "diff")(diff)


Base = Annotated[str, typer.Argument(help="The model before fine-tuning: a folder, a hub name, a name of the zoo.")]
Tuned = Annotated[str, typer.Argument(help="The model after it, or base+adapter.")]
Chat = Annotated[bool, option("Put prompts into the tuned model's chat template, for both models.", "--chat")]
BatchSize = Annotated[int, option("Prompts at a time.", min=1)]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], option("Type of their numbers.")]
Device = Annotated[str, option("Where they run: cpu, cuda, ...")]
Out = Annotated[Path | None, option("Keep every number there.", "--out", "-o", metavar="DIR")]
Number = Annotated[int | None, option("Prompts of each file.", "--n", min=1, default="all")]
Page = Annotated[Path | None, option("Texts coloured token by token, as one page.", "--html", metavar="FILE.html")]


def tuco(
    base: Base,
    tuned: Tuned,
    prompt: Annotated[
        list[Path],
        option("Prompts: a line each, or rows with `prompt`; repeat to compare.", "--prompts", metavar="FILE"),
    ],
    n: Number = None,
    chat: Chat = False,
    per_token: Annotated[bool, option("TuCo of every token too (for two passes).", "--per-token")] = False,
    sublayers: Annotated[
        bool, option("Attention and MLP apart: not the paper's decomposition.", "--sublayers")
    ] = False,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Workers = None,
    out: Out = None,
    plot: Annotated[Path | None, option("Draw the cumulative share by layer.", metavar="FILE.png")] = None,
    html: Page = None,
    force: Force = False,
) -> None:
    """Measure how much of what a fine-tuned model does to prompts is its fine-tuning (TuCo, ICML 2025).

    Of several files, the chance that a prompt of the first has a higher TuCo than one of another is told as well (AUC).

    \b
    Examples:
    surgery tuco tiny-base tiny-chain --prompts sums.txt --prompts words.txt --plot tuco.png
    surgery tuco BASE TUNED --prompts chats.jsonl --chat -o scores
    """
    began = time.perf_counter()
    _outputs(out, force, {".png", ".svg", ".pdf"}, plot)
    sets = {path.stem: prompts.texts(path, n) for path in prompt}
    if len(sets) < len(prompt):
        raise SurgeryError("Two of the files have the same name: their prompts could not be told apart.")

    from analysis.plots import save
    from analysis.results import concatenate
    from analysis.tuco import auc_between
    from analysis.tuco import tuco as measure

    pair = _pair(base, tuned, dtype, device, threads)
    found = {}
    for name, texts in sets.items():
        with frame.progress(f"TuCo of {name}") as advance:
            found[name] = measure(
                pair, texts, granularity="sublayer" if sublayers else "block",
                per_token=per_token or html is not None, chat=chat, batch_size=batch_size, progress=advance,
            )  # fmt: skip
    told: dict[str, Any] = {"base": base, "tuned": tuned, "sets": {k: v.value.summary() for k, v in found.items()}}
    first, *others = found
    areas = {other: auc_between(found[first], found[other]) for other in others}
    told["auc"] = {k: {"value": float(a.value), "low": float(a.low), "high": float(a.high)} for k, a in areas.items()}
    written = []
    if out is not None:
        for name, one in found.items():
            parts = {"tuco": one.value, "beta": one.beta, "ptc": one.pretraining, "ftc": one.finetuning,
                     "embedding": one.embedding, "tokens": one.tokens}  # fmt: skip
            written += [part.save(out / name / key) for key, part in parts.items() if part is not None]
    if plot is not None:
        together = concatenate([one.beta for one in found.values()], prompts=list(found))
        written.append(save(replace(found[first], beta=together).plot(by="prompts"), plot))
    if html is not None:
        from analysis.html import page

        written.append(page("TuCo by token", *(one.html(title=name) for name, one in found.items())).save(html))
    told |= {"written": list(map(str, written)), "seconds": round(time.perf_counter() - began, 2)}
    frame.result(told, *([] if frame.STATE.json or frame.STATE.quiet else [_tuco_table(found, told)]), _closing(told))


def diff(
    base: Base,
    tuned: Tuned,
    texts: Annotated[Path, option("Texts that both read: a line each, or rows with `text`.", metavar="FILE")],
    n: Number = None,
    measure: Annotated[
        list[str] | None,
        option("What to compare; repeatable.", default="kl, agreement, norms, cosine, cka, procrustes"),
    ] = None,
    site: Annotated[str, option("The place of the stream that is compared.")] = "resid_post",
    lens: Annotated[int, option("Tokens that the mean difference promotes at the first N positions.", min=0)] = 0,
    max_tokens: Annotated[int, option("Most tokens of a text.", min=1)] = 1024,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Workers = None,
    out: Out = None,
    plot: Annotated[Path | None, option("Draw all measures.", metavar="FILE.png")] = None,
    html: Page = None,
    force: Force = False,
) -> None:
    """Compare a base and its fine-tuning on texts: predictions token by token, activations layer by layer.

    \b
    Examples:
    surgery diff tiny-base tiny-chain --texts texts.txt --plot diff.png
    surgery diff BASE TUNED --texts web.jsonl --n 200 --lens 5 -o what-changed --html tokens.html
    """
    began = time.perf_counter()
    _outputs(out, force, {".png", ".svg", ".pdf"}, plot)
    read = prompts.texts(texts, n)

    from analysis.diff import DEFAULT, difference_lens
    from analysis.diff import diff as compare
    from analysis.plots import save

    pair = _pair(base, tuned, dtype, device, threads)
    with frame.progress("Comparing") as advance:
        found = compare(pair, read, measures=measure or DEFAULT, site=site, max_tokens=max_tokens,
                        batch_size=batch_size, progress=advance)  # fmt: skip
    told: dict[str, Any] = {"base": base, "tuned": tuned, "texts": len(read), "measures": found.summary()}
    if lens:
        told["lens"] = difference_lens(pair, read, positions=lens).words(6)
    written = []
    if out is not None:
        written.append(found.save(out))
    if plot is not None:
        written.append(save(found.plot(), plot))
    if html is not None:
        written.append(found.html().save(html))
    told |= {"written": list(map(str, written)), "seconds": round(time.perf_counter() - began, 2)}
    shown = [] if frame.STATE.json or frame.STATE.quiet else [_diff_table(told["measures"]), *_lens_lines(told)]
    frame.result(told, *shown, _closing(told))


def _pair(base: str, tuned: str, dtype: str, device: str, threads: int | None) -> Any:
    import torch

    from surgery.models import Pair, no_bars

    if threads is not None:
        torch.set_num_threads(threads)
    with no_bars():
        return Pair.load(base, tuned, dtype, device)


def _outputs(out: Path | None, force: bool, suffixes: set[str], plot: Path | None) -> None:
    if out is not None and out.exists() and not force:
        raise SurgeryError(f"The output {out} exists already.", hint="Choose another folder, or pass --force.")
    if plot is not None and plot.suffix not in suffixes:
        raise SurgeryError(f"--plot writes {', '.join(sorted(suffixes))} files, and '{plot}' is none.")


def _closing(told: dict[str, Any]) -> str:
    closing = f"Done in {frame.seconds(told['seconds'])}."
    return closing + (" Written: " + ", ".join(told["written"]) if told["written"] else "")


def _tuco_table(found: dict[str, Any], told: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="TuCo", caption="in brackets: 95 % intervals; AUC: the first set against the others")
    for word in ("prompts", "n", "TuCo", "AUC"):
        table.add_column(word, justify="left" if word == "prompts" else "right")
    for name, one in found.items():
        low, high = one.value.interval()
        area = told["auc"].get(name)
        cell = "" if area is None else f"{area['value']:.3f} [{area['low']:.3f}, {area['high']:.3f}]"
        table.add_row(name, f"{len(one):,}", f"{one.value.mean:.3f} [{low:.3f}, {high:.3f}]", cell)
    return table


def _diff_table(rows: list[dict[str, Any]]) -> Any:
    """A line a measure; of those by layer the range over the layers."""
    from rich.table import Table

    table = Table(caption="in brackets: 95 % intervals; by layer: first, middle and last")
    for word in ("measure", "mean", "by layer"):
        table.add_column(word, justify="left" if word == "measure" else "right")
    for name in dict.fromkeys(row["measure"] for row in rows):
        mine = [row for row in rows if row["measure"] == name]
        if mine[0]["layer"] is None:
            one = mine[0]
            spread = "" if one["low"] is None else f" [{one['low']:.4g}, {one['high']:.4g}]"
            table.add_row(name, f"{one['mean']:.4g}{spread}", "")
        else:
            picked = [mine[0], mine[len(mine) // 2], mine[-1]]
            table.add_row(name, "", "  ".join(f"{row['layer']}: {row['mean']:.4g}" for row in picked))
    return table


def _lens_lines(told: dict[str, Any]) -> list[str]:
    return [
        f"position {row['position']}: promoted " + " ".join(repr(token) for token, _ in row["promoted"])
        for row in told.get("lens", ())
    ]
