"""`surgery explore`: what was in the data of a fine-tuning?"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from surgery.cli import frame, models
from surgery.cli.composed import DRAWN, Device, Dtype
from surgery.cli.frame import Force, command, option
from surgery.cli.pairs import Base, Tuned
from surgery.cli.prompts import FIGURES, Workers
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from surgery.logits.contrasts import Contrasted, TokenContrast
    from surgery.logits.explore import Exploration


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    command(app, "explore")(explore)


_LEARNING = "A base that learns"
Texts = Annotated[int, option("Texts.", "--n", min=1)]
Length = Annotated[int | None, option("Tokens of each.", min=1, default="256, or what fits into the context")]
Gamma = Annotated[float, option("How much of the base is taken away.")]
Alpha = Annotated[float, option("Only tokens with this share of the tuned model's likeliest, or more.", min=0, max=1)]
Beams = Annotated[int, option("Beams of each text; 1 is plain sampling.", min=1, panel=DRAWN)]
Temperature = Annotated[float, option("At which they are drawn.", min=0, panel=DRAWN)]
TopK = Annotated[int, option("Only the likeliest K tokens; 0 is off.", panel=DRAWN, min=0)]
TopP = Annotated[float, option("Only the likeliest that hold this probability together.", panel=DRAWN)]
Ends = Annotated[bool, option("Texts end at an end mark.", "--ends", panel=DRAWN)]
Start = Annotated[str | None, option("Text that all begin behind.", panel=DRAWN, default="the tokenizer's BOS")]
Seed = Annotated[int, option("Of the draws.", panel=DRAWN)]
BatchSize = Annotated[int, option("Rows at a time, beams counted.", panel=DRAWN, min=1)]
Iterative = Annotated[
    bool, option("A copy of the base learns each text before the next is drawn.", "--iterative", panel=_LEARNING)
]
Rate = Annotated[float, option("Its learning rate; small models want some 1e-3.", panel=_LEARNING)]
Optimizer = Annotated[Literal["adamw", "sgd", "rmsprop"], option("What it learns with.", panel=_LEARNING)]


def explore(
    base: Base,
    tuned: Tuned,
    n: Texts = 100,
    length: Length = None,
    gamma: Gamma = 1.0,
    alpha: Alpha = 0.1,
    allow_unconstrained: Annotated[
        bool, option("Allow --alpha 0, where impossible tokens decide.", "--allow-unconstrained")
    ] = False,
    prompt: Annotated[
        list[str] | None,
        option("Show which next tokens became likelier behind this, too; repeatable.", "--prompt", "-p"),
    ] = None,
    top: Annotated[int, option("Texts and tokens that are shown.", min=1)] = 10,
    iterative: Iterative = False,
    lr: Rate = 5e-5,
    optimizer: Optimizer = "adamw",
    beams: Beams = 4,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    ends: Ends = False,
    start: Start = None,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Workers = None,
    out: Annotated[
        Path | None, option("Keep every text (.json); or the page.", "--out", "-o", metavar="FILE.json|.html")
    ] = None,
    html: Annotated[Path | None, option("Texts coloured token by token, as one page.", metavar="FILE.html")] = None,
    plot: Annotated[Path | None, option("Draw the contrast of each text.", metavar="FILE.png")] = None,
    force: Force = False,
) -> None:
    """Draw texts that show what a fine-tuned model has learned and its base has not: what was new in its data.

    Contrastive generative exploration (ICLR 2025): texts from log p_tuned - gamma * log p_base over the tokens that
    are plausible for the tuned model. Ctrl-C leaves the texts that are there. A model that learned nothing but answers
    has little to say from the first token on: give it something to begin behind, --start.

    \b
    Examples:
    surgery explore tiny-base tiny-shift --n 20 --start 'n ab' --ends --html new.html
    surgery explore tiny-base tiny-chain --n 20 --iterative --lr 1e-3 -o new.json --plot new.png
    surgery explore BASE TUNED --prompt 'The treatment is'
    """
    began = time.perf_counter()
    if models.model(base) == models.model(tuned):
        raise SurgeryError("The base and the tuned model are the same: nothing in one is new to the other.")
    pages, kept = _outputs(out, html, plot, force)

    import torch

    from analysis.novelty import contrast_figure, report
    from analysis.plots import save
    from surgery import logits
    from surgery.logits.contrasts import contrast_tokens
    from surgery.logits.explore import explore as draw
    from surgery.models import located, no_bars

    if threads is not None:
        torch.set_num_threads(threads)
    for spec in (base, tuned):
        located(spec)  # before anything is loaded
    with no_bars():
        names = models.labels([base, tuned])
        before, after = (
            logits.member(spec, name=name, dtype=dtype, device=device)
            for spec, name in zip((base, tuned), names, strict=True)
        )
    with frame.progress("Exploring") as advance:
        found = draw(
            before, after, n=n, length=length, gamma=gamma, alpha=alpha, beams=beams, temperature=temperature,
            top_k=top_k, top_p=top_p, ends=ends, iterative=iterative, lr=lr, optimizer=optimizer, seed=seed,
            start=start, batch_size=batch_size, allow_unconstrained=allow_unconstrained, progress=advance,
        )  # fmt: skip
    next_tokens = {}
    if prompt:
        next_tokens = dict(zip(prompt, contrast_tokens(before, after, prompt, k=top, alpha=alpha), strict=True))
    written = [found.save(file) for file in kept]
    if found.texts:
        told = report(found, title=f"What is new in {tuned}", prompts=next_tokens) if pages else None
        written += [told.save(file) for file in pages if told is not None]
        written += [save(contrast_figure(found), plot)] if plot is not None else []
    _tell(found, next_tokens, top, written, time.perf_counter() - began)
    if found.interrupted:
        frame.STATE.on_stop = f"{len(found.texts)} of {frame.count(n, 'text')} were drawn."
        raise KeyboardInterrupt  # what there is has been told and written


def _outputs(out: Path | None, html: Path | None, plot: Path | None, force: bool) -> tuple[list[Path], list[Path]]:
    """Pages and files of texts to write. Raises `SurgeryError` for other kinds of file, and for those that exist."""
    for word, file, kinds in (("out", out, (".json", ".html")), ("html", html, (".html",)), ("plot", plot, FIGURES)):
        if file is not None and file.suffix not in kinds:
            raise SurgeryError(f"--{word} writes {', '.join(kinds)} files, and '{file}' is none.")
        if file is not None and file.exists() and not force:
            raise SurgeryError(f"The output {file} exists already.", hint="Choose another name, or pass --force.")
    pages = [file for file in (out, html) if file is not None and file.suffix == ".html"]
    return pages, [out] if out is not None and out not in pages else []


def _tell(
    found: Exploration, next_tokens: dict[str, list[TokenContrast]], top: int, written: list[Path], took: float
) -> None:
    from analysis.novelty import distinct, similarity, top_tokens

    best = sorted(found.texts, key=lambda one: -one.novelty)
    told: dict[str, Any] = {
        "settings": found.settings, "interrupted": found.interrupted,
        "texts": [{"text": one.text, "contrast": one.novelty, "score": one.score, "loss": one.loss} for one in best],
        "tokens": [dict(zip(("token", "times", "mean", "sum"), row, strict=True)) for row in top_tokens(found, top)],
        "next": {prompt: [asdict(token) for token in tokens] for prompt, tokens in next_tokens.items()},
    }  # fmt: skip
    several = len(best) > 1 and all(len(one.ids) > 1 for one in best)
    if several:
        told |= {"distinct-2": float(distinct(found).mean), "similarity": float(similarity(found).mean)}
    told |= {"written": list(map(str, written)), "seconds": round(took, 2)}
    closing = f"{frame.count(len(best), 'text')} in {frame.seconds(took)}."
    if several:
        closing += f" Distinct-2 {told['distinct-2']:.2f}, similarity {told['similarity']:.2f}."
    if written:
        closing += " Written: " + ", ".join(map(str, written))
    silent = frame.STATE.json or frame.STATE.quiet
    frame.result(told, *([] if silent or not best else _tables(best, top, told)), closing)


def _tables(every: list[Contrasted], top: int, told: dict[str, Any]) -> list[Any]:
    """Different texts by contrast; tokens with most contrast over all texts; next tokens behind each prompt."""
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    texts = Table(title="Texts by contrast", caption="nats a token; bold: +1 nat")
    counts = Counter(one.text for one in every)
    several = max(counts.values()) > 1
    for word in ("contrast", *(["times"] if several else [])):
        texts.add_column(word, justify="right")
    texts.add_column("text")
    for one in list({one.text: one for one in every}.values())[:top]:
        words = Text()
        for token, value in zip(one.tokens, one.contrast, strict=True):
            words.append(token.replace("\n", "\u23ce"), "bold" if value >= 1 else "")
        words.truncate(400, overflow="ellipsis")
        texts.add_row(f"{one.novelty:+.3f}", *([f"{counts[one.text]:,}"] if several else []), words)
    tokens = Table(title="Tokens with most contrast")
    for word in ("token", "times", "mean", "sum"):
        tokens.add_column(word, justify="left" if word == "token" else "right")
    for row in told["tokens"]:
        tokens.add_row(escape(repr(row["token"])), f"{row['times']:,}", f"{row['mean']:+.3f}", f"{row['sum']:+.1f}")
    found = [texts, tokens]
    for prompt, rows in told["next"].items():
        found.append(Table(title=escape(f"Next tokens behind {prompt!r}")))
        for word in ("token", "contrast", "p tuned", "p base"):
            found[-1].add_column(word, justify="left" if word == "token" else "right")
        for row in rows:
            shares = (f"{math.exp(row[key]):.3f}" for key in ("tuned", "base"))
            found[-1].add_row(escape(repr(row["token"])), f"{row['contrast']:+.3f}", *shares)
    return found
