"""`surgery delta extract | apply | overlap | convert`: the few numbers that a fine-tuning moved, as small files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from surgery.cli import frame, models
from surgery.cli.frame import Force, Threads, command, new_app, option
from surgery.cli.vector import BaseModel, Only, OutFolder, Without
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from surgery.weights.deltas.algebra import Overlap
    from surgery.weights.deltas.file import SparseDelta

app = new_app(help="Sparse deltas: the few numbers that a fine-tuning moved. Take them out, put them in, add them up.")

Deltas = Annotated[list[str], typer.Argument(help="Deltas; also adapters of PEFT's SHiRA and Super-Tuning.")]
Base = Annotated[str | None, option("The base, for deltas of mode set and for adapters.")]
Pickle = Annotated[bool, option("Read LT-SFT's pickle, as plain numbers.", "--allow-pickle")]


@command(app, "extract")
def extract(
    base: Annotated[str, typer.Argument(help="The model that was fine-tuned.")],
    tuned: Annotated[str, typer.Argument(help="What was made of it.")],
    out: Annotated[Path, option("The file to write (.safetensors).", "--out", "-o", metavar="FILE")],
    mode: Annotated[
        Literal["set", "add"], option("Keep the tuned numbers (exact to the bit), or differences (stand alone).")
    ] = "set",
    density: Annotated[float | None, option("Only this share of every tensor, the largest changes.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, option("Type of the differences.", default="float32")
    ] = None,
    only: Only = None,
    without: Without = None,
    threads: Threads = None,
    force: Force = False,
) -> None:
    """Keep the numbers in which a fine-tuning differs from its base, with their places.

    \b
    Examples:
    surgery delta extract BASE TUNED -o tuned.safetensors
    surgery delta extract tiny-base tiny-chain -o chain.safetensors --density 0.05
    surgery delta extract BASE TUNED -o mlp.safetensors --mode add --dtype bfloat16 --only mlp
    """
    from surgery.weights.deltas.file import SparseDelta
    from surgery.weights.vector import TaskVector

    first, second = models.model(base), models.model(tuned)
    places: dict[str, Any] | None = None
    noted: dict[str, Any] = {}
    if only or without or density is not None:
        vector = TaskVector.between(first, second)
        vector = vector.only(*only) if only else vector
        vector = vector.without(*without) if without else vector
        places = dict.fromkeys(vector.names)
        if density is not None:
            largest = SparseDelta.of(vector.sparsified(density))
            places = {name: entry.places for name, entry in largest.entries.items()}
            noted = {"method": "magnitude", "parameters": {"density": density}}
    with frame.progress("Comparing") as advance:
        delta = SparseDelta.between(first, second, mode, only=places, dtype=dtype, progress=advance, **noted,
                                    **frame.threads(threads))  # fmt: skip
    written = delta.save(out, force=force)
    nbytes = written.stat().st_size
    value = {"out": str(written), "mode": mode, "definition": delta.definition, "tensors": len(delta),
             "count": delta.count, "total": delta.total, "density": delta.density, "bytes": nbytes}  # fmt: skip
    each = f" ({nbytes / delta.count:.2f} bytes each)" if delta.count else ""
    frame.result(value, f"{delta.definition}: {delta.count:,} of {delta.total:,} numbers ({delta.density:.2%}) in "
                        f"{frame.count(len(delta), 'tensor')}; {frame.size(nbytes)}{each}.\n"
                        f"The delta is in {written}")  # fmt: skip


@command(app, "apply")
def apply(
    base: BaseModel,
    deltas: Deltas,
    out: OutFolder,
    scale: Annotated[float, option("Times what; negative takes it away.")] = 1.0,
    undo: Annotated[
        Path | None, option("Write a delta there that turns the output into its base again.", metavar="FILE")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, option("Type of the stored numbers.", default="the base's")
    ] = None,
    transfer: Annotated[bool, option("Allow a base that is not the deltas' own.", "--transfer")] = False,
    anyway: Annotated[bool, option("Allow even a base of another origin.", "--transfer-anyway")] = False,
    delta_base: Annotated[str | None, option("The deltas' own base, which a transfer may need.")] = None,
    allow_pickle: Pickle = False,
    threads: Threads = None,
    force: Force = False,
) -> None:
    """Write a base with one delta, or with the sum of several, as a model.

    One delta of mode set gives the tuned model's bits. The sum of several does not depend on their order.

    \b
    Examples:
    surgery delta apply tiny-base chain.safetensors -o chain-again --undo back.safetensors
    surgery delta apply chain-again back.safetensors -o base-again
    surgery delta apply BASE language.safetensors task.safetensors -o both
    """
    from surgery.weights.deltas.extract import apply_with_undo
    from surgery.weights.deltas.file import SparseDelta

    source = models.model(base)
    own = None if delta_base is None else models.model(delta_base)
    read = [_read(spec, own or source, allow_pickle) for spec in deltas]
    transferred: Any = "anyway" if anyway else transfer
    if transferred and own is None and any(delta.mode == "set" for delta in read):
        raise SurgeryError(
            "A delta of mode set is made differences beside its own base.", hint="Add --delta-base BASE."
        )
    one = read[0] if len(read) == 1 else SparseDelta.compose(read, own or source)
    vector = one.vector(own)
    with frame.progress("Applying") as advance:
        done = apply_with_undo(
            vector, source, out, undo=undo, scale=scale, dtype=dtype, transfer=transferred, force=force,
            progress=advance, **frame.threads(threads),
        )  # fmt: skip
    actions = [report.action for report in done.tensors.values()]
    counts = {action: actions.count(action) for action in dict.fromkeys(actions)}
    frame.notes(done.warnings)
    value = {"out": str(done.out), "bytes": done.nbytes, "tensors": counts, "rounding_loss": done.rounding_loss,
             "undo": None if undo is None else str(undo), "warnings": done.warnings}  # fmt: skip
    told = ", ".join(f"{number} {action}" for action, number in counts.items())
    back = "" if undo is None else f"\nThe way back is in {undo}"
    frame.result(value, f"Applied {', '.join(deltas)} to {base}: {told}; {frame.size(done.nbytes)} in "
                        f"{frame.seconds(done.seconds)}.\nThe model is in {done.out}{back}")  # fmt: skip


@command(app, "overlap")
def overlap(
    deltas: Deltas,
    base: Base = None,
    by: Annotated[Literal["pair", "tensor"], option("What a row of the table is.")] = "pair",
    plot: Annotated[Path | None, option("Write a figure there (.png, .svg, .pdf).", metavar="FILE")] = None,
    allow_pickle: Pickle = False,
) -> None:
    """Show how far deltas move the same numbers, and how often in the same direction.

    Overlap: numbers that both move, as a share of what the smaller one moves. The same way: the share of those that
    both move up or both move down; for deltas of mode set it needs --base.

    \b
    Examples:
    surgery delta overlap chain.safetensors shift.safetensors --base tiny-base
    surgery delta overlap a.safetensors b.safetensors c.safetensors --plot overlap.png
    """
    from surgery.weights.deltas.algebra import overlap as measure

    if len(deltas) < 2:
        raise SurgeryError("Only one delta was named.", hint="Add another: overlap DELTA DELTA...")
    known = None if base is None else models.model(base)
    found = measure([_read(spec, known, allow_pickle) for spec in deltas], known, models.labels(deltas))
    value: dict[str, Any] = {"labels": found.labels, "pairs": found.rows()}
    if by == "tensor":
        value["tensors"] = found.rows("tensor")
    lines: list[Any] = [] if frame.STATE.json or frame.STATE.quiet else [_table(found, by)]
    if plot is not None:
        from analysis.deltas import overlap_figure
        from analysis.plots import save

        value["written"] = str(save(overlap_figure(found), plot))
        lines.append(f"Written: {plot}")
    frame.result(value, *lines)
    if any(pair.signed is None for pair in found.pairs.values()):
        frame.notes(["Deltas of mode set keep numbers, not changes: their directions are known beside --base BASE."])


@command(app, "convert")
def convert(
    delta: Annotated[str, typer.Argument(help="A delta, LT-SFT's pytorch_diff.bin, or an adapter's folder.")],
    out: Annotated[Path, option("What to write: a file, or a folder for adapters.", "--out", "-o", metavar="PATH")],
    to: Annotated[Literal["delta", "lt-sft", "shira", "supertuning"], option("The format.")],
    base: Base = None,
    allow_pickle: Pickle = False,
    force: Force = False,
) -> None:
    """Turn a delta into the format of a peer, or a peer's into a delta.

    \b
    Examples:
    surgery delta convert chain.safetensors -o chain-shira --to shira --base tiny-base
    surgery delta convert chain-shira -o chain-add.safetensors --to delta --base tiny-base
    surgery delta convert pytorch_diff.bin -o language.safetensors --to delta --allow-pickle
    """
    from surgery.weights.deltas.formats import write

    known = None if base is None else models.model(base)
    taken = _read(delta, known, allow_pickle)
    done = write(taken, out, to, known, force=force)
    if done.left_out:
        frame.notes([f"{frame.count(len(done.left_out), 'tensor')} moved but have no place in {to}, and are left out: "
                     f"{', '.join(done.left_out[:6])}"])  # fmt: skip
    value = {"out": str(done.out), "to": to, "count": done.count, "padded": done.padded, "left_out": done.left_out}
    more = f", filled up with {done.padded:,} zeros" if done.padded else ""
    frame.result(value, f"{taken.definition}: {done.count:,} numbers{more}.\nWritten as {to}: {done.out}")


# ---- arguments and tables ------------------------------------------------------------------------------------------


def _read(spec: str, base: str | None, allow_pickle: bool) -> SparseDelta:
    """A delta from its file (its base is looked at where it is used), or from a peer's beside `base`."""
    from surgery.weights.deltas.file import SparseDelta, is_delta
    from surgery.weights.deltas.formats import read

    if is_delta(spec):
        return SparseDelta.load(spec)
    if not Path(spec).expanduser().exists():
        raise SurgeryError(f"There is no file or folder '{spec}'.", hint="Extract one: surgery delta extract.")
    return read(spec, base, allow_pickle=allow_pickle)


def _table(found: Overlap, by: str) -> Any:
    from rich.table import Table

    table = Table(title="Overlap of deltas" + (" by tensor" if by == "tensor" else ""))
    names = {"a": "a", "b": "b", "tensor": "tensor", "count_a": "numbers of a", "count_b": "of b", "common": "of both",
             "overlap": "overlap", "chance": "by chance", "agreement": "the same way"}  # fmt: skip
    rows = found.rows(by)
    shown = {key: title for key, title in names.items() if key in rows[0]}
    for key, title in shown.items():
        table.add_column(title, justify="left" if key in ("a", "b", "tensor") else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row[key]) for key in shown))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if value != value else f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else str(value)
