"""`surgery sae features`: what a dictionary's latents stand for, and which of them fine-tuning made."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from surgery.cli import frame
from surgery.cli.composed import Device, Dtype
from surgery.cli.frame import Force, command, option
from surgery.cli.prompts import FIGURES, Workers
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from analysis.features.overview import Overview
    from analysis.features.reader import Reader
    from surgery.sae.dictionary import Dictionary


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    command(app, "features")(features)


_TEXTS = "What is read"
Base = Annotated[
    str | None, option("The model before fine-tuning: the dictionary reads both.", default="that of its file, if any")
]
Texts = Annotated[Path | None, option("A line, or a row with `text`, or `prompt` and `completion`, each.",
                                      metavar="FILE", panel=_TEXTS)]  # fmt: skip
Task = Annotated[str | None, option("Or a task, with its answers.", panel=_TEXTS)]
Latent = Annotated[
    list[int] | None, option("Show this latent; repeatable.", "--latent", "-l", default="those that --show says")
]
Show = Annotated[
    Literal["tuned", "base", "used"] | None,
    option("Latents of the tuned model, of the base, or the most used.", default="tuned for a pair, else used"),
]
Page = Annotated[Path | None, option("Write a page: numbers, histograms, coloured text.", metavar="FILE.html")]
Plot = Annotated[Path | None, option("Draw how latents lie between base and tuned.", metavar="FILE.png")]


def features(
    dictionary: Annotated[Path, typer.Argument(help="Folder of a dictionary, of any format.")],
    model: Annotated[
        str | None, option("The model it reads; of a pair the tuned one.", default="that of its file")
    ] = None,
    base: Base = None,
    texts: Texts = None,
    task: Task = None,
    n: Annotated[int, option("Texts.", "--n", min=1, panel=_TEXTS)] = 256,
    seed: Annotated[int, option("Of a task's examples, and of those drawn by chance.", panel=_TEXTS)] = 0,
    site: Annotated[str | None, option("Where it reads, as resid_post.6.", default="that of its file")] = None,
    top: Annotated[int, option("Latents that are shown.", min=1)] = 10,
    latent: Latent = None,
    show: Show = None,
    k: Annotated[int, option("Examples of each.", "--examples", "-k", min=1)] = 5,
    chance: Annotated[int, option("And so many active tokens by chance.", "--random", min=0)] = 0,
    difference: Annotated[bool, option("It was trained on x_tuned - x_base.", "--difference")] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Workers = None,
    html: Page = None,
    plot: Plot = None,
    force: Force = False,
) -> None:
    """Show latents of a dictionary: where they are active, what they promote, and whose they are in a pair.

    A crosscoder tells base and tuned model apart by its decoder's norms, with latent scaling as a check (nu near 0: the
    tuned model's alone). A dictionary of one model reads both when --base is named: firing rates on the same tokens.

    \b
    Examples:
    surgery sae features runs/crosscoder/dictionaries/middle --task chain --html features.html
    surgery sae features sae_folder --model smollm2 --texts texts.jsonl --site resid_post.14 --latent 17
    surgery sae features DICTIONARY --model TUNED --base BASE --texts texts.txt --show base
    """
    began = time.perf_counter()
    for word, file, kinds in (("html", html, (".html",)), ("plot", plot, FIGURES)):
        if file is not None and file.suffix not in kinds:
            raise SurgeryError(f"--{word} writes {', '.join(kinds)} files, and '{file}' is none.")
        if file is not None and file.exists() and not force:
            raise SurgeryError(f"The output {file} exists already.", hint="Choose another name, or pass --force.")
    read = _texts(texts, task, n, seed)

    import torch

    from analysis.features.overview import overview
    from analysis.plots import save
    from surgery.sae.formats import load

    if threads is not None:
        torch.set_num_threads(threads)
    loaded, about = load(dictionary)
    readers, names = _readers(loaded, about, dictionary, model, base, site, difference, dtype, device)
    found = overview(readers, read, latent, top=top, show=show, k=k, random=chance, seed=seed)
    written = []
    if html is not None:
        written.append(found.page(f"Features of {dictionary.name}", k).save(html))
    if plot is not None:
        written.append(save(found.plot(), plot))
    told = {"dictionary": str(dictionary), "models": names} | found.to_dict(k) | {
        "written": list(map(str, written)), "seconds": round(time.perf_counter() - began, 2)}  # fmt: skip
    closing = f"{frame.count(told['texts'], 'text')}, {frame.count(told['tokens'], 'token')} at {found.reader.site}"
    closing += f" in {frame.seconds(told['seconds'])}."
    if written:
        closing += " Written: " + ", ".join(map(str, written))
    quiet = frame.STATE.json or frame.STATE.quiet
    frame.result(told, *([] if quiet else _lines(found, k)), closing)


def _texts(file: Path | None, task: str | None, n: int, seed: int) -> list[str]:
    """The texts: prompts with their completions. Raises `SurgeryError` when nothing or both are named."""
    if (file is None) == (task is None):
        raise SurgeryError("There is no text to read." if file is None else "--texts and --task are two texts.",
                           hint="Name one: --texts FILE, or --task chain.")  # fmt: skip
    if task is not None:
        from surgery.tasks import make_task

        rows = [example.row(task) for example in make_task(task).examples(n, seed)]
    else:
        from surgery.cli import prompts

        assert file is not None
        rows = prompts.rows(file, n)
    if wrong := [i for i, row in enumerate(rows) if not isinstance(row["prompt"], str)]:
        raise SurgeryError(f"Row {wrong[0]} is no text.", hint="Give `text`, or `prompt` and `completion`.")
    return [row["prompt"] + str(row.get("completion") or "") for row in rows]


def _readers(
    loaded: Dictionary, about: dict[str, Any], folder: Path, model: str | None, base: str | None, site: str | None,
    difference: bool, dtype: Any, device: str,
) -> tuple[Reader | list[Reader], list[str]]:  # fmt: skip
    """The dictionary at its place, and the models' names. What is not said is looked up beside the dictionary."""
    known = [str(name) for name in about.get("models") or ([about["model_name"]] if about.get("model_name") else [])]
    difference = difference or bool(about.get("difference"))
    paired = loaded.models == 2 or difference
    tuned = model or (known[-1] if known else None)
    base = base or (known[0] if paired and len(known) == 2 else None)
    place, target = site or about.get("site") or about.get("hook_name"), None if site else about.get("target")
    if loaded.models > 2:
        raise SurgeryError(f"This crosscoder reads {loaded.models} models, and pairs are shown.")
    if tuned is None:
        raise SurgeryError(f"{folder} does not say which model it reads.", hint="Add --model MODEL.")
    if paired and base is None:
        raise SurgeryError(f"{folder} is of two models, and only one is named.", hint="Add --base BASE.")
    if place is None:
        raise SurgeryError(f"{folder} does not say where it reads.", hint="Add --site, for example resid_post.6.")

    from analysis.features.reader import Reader
    from surgery.sae.source import opened

    names = [tuned] if base is None else [base, tuned]
    models, tokenizer = opened(names, dtype, device)
    if paired or base is None:
        return Reader(loaded, models, place, tokenizer, difference=difference, target=target), names
    return [Reader(loaded, one, place, tokenizer, target=target) for one in models], names


def _lines(found: Overview, k: int) -> list[Any]:
    """A table of the latents, and of each its examples as coloured text."""
    from rich.table import Table
    from rich.text import Text

    from analysis.style import shown

    rows = found.rows()
    heads = [name for name in rows[0] if not name.startswith("norm")]
    table = Table(title="Latents", title_justify="left")
    for head in heads:
        table.add_column(head, justify="left" if head in ("kind", "fate") else "right")
    for row in rows:
        table.add_row(*(f"{row[h]:.3g}" if isinstance(row[h], float) else str(row[h]) for h in heads))
    lines: list[Any] = [table]
    if found.kinds:
        lines.insert(0, "All latents: " + ", ".join(f"{count} {name}" for name, count in found.kinds.items()) + ".")
    for j in found.latents:
        line = Text(f"\nlatent {j}", style="bold")
        if j in found.tokens:
            up, down = (" ".join(shown(token) for token, _ in side[:5]) for side in found.tokens[j])
            line.append(f"   promotes {up}   suppresses {down}", style="not bold")
        lines.append(line)
        for name, each in found.sets.items():
            if name:
                lines.append(Text(f"in the {name} model", style="italic"))
            for kind in each.best:
                lines += [Text("by chance", style="italic")] if kind == "random" else []
                lines.append(each.rich(j, k=k, kind=kind))
    return lines
