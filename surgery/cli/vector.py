"""`surgery vector extract | apply | combine | export-lora`: vectors taken out, computed with, put into models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from surgery import formula as formulas
from surgery.cli import frame, models
from surgery.cli.frame import Force, Threads, command, new_app, option
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from surgery.weights.vector import TaskVector
    from surgery.weights.vector_file import Saved

app = new_app(help="Task vectors: what fine-tuning changed. Take it out, look at it, compute with it, apply it.")

FORM_OPTIONS: dict[str, tuple[str, ...]] = {
    "lossless": (), "float32": (), "bfloat16": (), "sign": (), "int8": ("block",),
    "topk": ("density", "dtype"), "low_rank": ("rank", "energy", "dtype", "seed"),
}  # fmt: skip
"""What each form takes, as in `surgery.weights.formats.FORMS`."""

_FORM = "Options of some forms"
Form = Literal["lossless", "float32", "bfloat16", "topk", "low_rank", "sign", "int8"]
FormOption = Annotated[Form, option("How it is stored. lossless and float32 are exact, the others smaller.")]
Density = Annotated[float | None, option("topk: share of the numbers kept.", panel=_FORM, default="0.05")]
Rank = Annotated[int | None, option("low_rank: rank of every matrix.", panel=_FORM, default="16")]
Energy = Annotated[float | None, option("low_rank: share of the squared norm to keep, instead of a rank.", panel=_FORM)]
Block = Annotated[int | None, option("int8: numbers that share a scale.", panel=_FORM, default="128")]
Stored = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    option("topk, low_rank: type of the kept numbers.", "--dtype", panel=_FORM, default="bfloat16"),
]
Seed = Annotated[int | None, option("low_rank: of the randomised SVD.", panel=_FORM, default="0")]

Vector = Annotated[str, typer.Argument(help="A stored vector; also a fine-tuned model, or a LoRA adapter.")]
BaseModel = Annotated[str, typer.Argument(help="The model to start from.")]
Base = Annotated[str | None, option("The base, for lossless vectors and for models in the place of vectors.")]
OutFile = Annotated[Path, option("The file (.safetensors) or folder to write.", "--out", "-o", metavar="FILE")]
OutFolder = Annotated[Path, option("The folder to write.", "--out", "-o", metavar="DIR")]
Only = Annotated[list[str] | None, option("Only tensors with this in their name (or pattern); repeatable.")]
Without = Annotated[list[str] | None, option("No tensors with this in their name (or pattern); repeatable.")]


@command(app, "extract")
def extract(
    base: Annotated[str, typer.Argument(help="The model that was fine-tuned.")],
    tuned: Annotated[str, typer.Argument(help="What was made of it; also a LoRA adapter.")],
    out: OutFile,
    form: FormOption = "lossless",
    density: Density = None,
    rank: Rank = None,
    energy: Energy = None,
    block: Block = None,
    dtype: Stored = None,
    seed: Seed = None,
    only: Only = None,
    without: Without = None,
    missing: Annotated[
        Literal["error", "skip"], option("What to do with tensors that only one of the models has.")
    ] = "error",
    threads: Threads = None,
    force: Force = False,
) -> None:
    """Take out what fine-tuning changed: tuned - base.

    \b
    Examples:
    surgery vector extract BASE TUNED -o tuned.safetensors
    surgery vector extract tiny-base tiny-chain -o chain.safetensors --form topk --density 0.1
    surgery vector extract BASE TUNED -o mlp.safetensors --only mlp --form int8
    """
    if missing == "skip":
        from surgery.weights.vector import TaskVector

        taken = TaskVector.between(models.model(base), models.model(tuned), missing=missing)
    else:
        taken = models.vector(tuned, base)
    taken = _filtered(taken, only, without)
    given = {"density": density, "rank": rank, "energy": energy, "block": block, "dtype": dtype, "seed": seed}
    _save(taken, out, form, given, threads, force)


@command(app, "apply")
def apply(
    vector: Vector,
    base: BaseModel,
    out: OutFolder,
    scale: Annotated[float, option("Times what; negative takes it away.")] = 1.0,
    only: Only = None,
    without: Without = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, option("Type of the stored numbers.", default="the base's")
    ] = None,
    transfer: Annotated[bool, option("Allow a base that is not the vector's own.", "--transfer")] = False,
    anyway: Annotated[bool, option("Allow even a base of another origin.", "--transfer-anyway")] = False,
    vector_base: Annotated[str | None, option("The vector's own base, which a transfer may need.")] = None,
    rounding: Annotated[Literal["nearest", "stochastic"], option("How numbers are rounded when stored.")] = "nearest",
    seed: Annotated[int, option("Of stochastic rounding.")] = 0,
    shard_size: Annotated[str, option("Most bytes of one file.", metavar="SIZE")] = "5GB",
    threads: Threads = None,
    force: Force = False,
) -> None:
    """Write base + scale * vector as a model.

    \b
    Examples:
    surgery vector apply chain.safetensors tiny-base -o chain-again
    surgery vector apply toxic.safetensors BASE -o detoxified --scale -0.5
    surgery vector apply chat.safetensors NEWER-BASE -o chat --transfer --vector-base BASE
    """
    transferred: Any = "anyway" if anyway else transfer
    own = vector_base or (None if models.is_vector(vector) else base)
    taken = _filtered(_own(vector, own, bool(transferred)), only, without)
    with frame.progress("Applying") as advance:
        done = taken.apply(
            models.model(base), out, scale=scale, dtype=dtype, transfer=transferred, rounding=rounding, seed=seed,
            shard_size=shard_size, force=force, progress=advance, **frame.threads(threads),
        )  # fmt: skip
    actions = [report.action for report in done.tensors.values()]
    counts = {action: actions.count(action) for action in dict.fromkeys(actions)}
    frame.notes(done.warnings)
    if done.rounding_loss > 0.2:
        frame.notes([f"Rounding lost {done.rounding_loss:.0%} of the update: --dtype float32 keeps it, and "
                     "--rounding stochastic keeps it on average."])  # fmt: skip
    value = {"out": str(done.out), "bytes": done.nbytes, "seconds": round(done.seconds, 3), "tensors": counts,
             "rounding_loss": done.rounding_loss, "warnings": done.warnings}  # fmt: skip
    told = ", ".join(f"{number} {action}" for action, number in counts.items())
    frame.result(value, f"Applied {vector} to {base}: {told}; {frame.size(done.nbytes)} in "
                        f"{frame.seconds(done.seconds)}.\nThe model is in {done.out}")  # fmt: skip


@command(app, "combine")
def combine(
    out: OutFile,
    formula: Annotated[
        list[str] | None, typer.Argument(metavar="[FORMULA] [NAME=FILE]...", help="As in 'a - b + 0.5*c' a=A b=B c=C.")
    ] = None,
    add: Annotated[
        list[str] | None, option("A vector to add, times a number if there is one; repeatable.", metavar="FILE[:X]")
    ] = None,
    analogy: Annotated[
        tuple[str, str, str] | None, option("A is to B as C is to the result: C + (B - A).", metavar="A B C")
    ] = None,
    base: Base = None,
    form: FormOption = "float32",
    density: Density = None,
    rank: Rank = None,
    energy: Energy = None,
    block: Block = None,
    dtype: Stored = None,
    seed: Seed = None,
    only: Only = None,
    without: Without = None,
    threads: Threads = None,
    force: Force = False,
) -> None:
    """Compute with vectors, and store the result as one.

    A formula knows + - * / and brackets. One that begins with a minus needs a space before it: " -a". A name that is
    no word is quoted: "'v1.2' + b".

    \b
    Examples:
    surgery vector combine "a - b + 0.5*c" a=A.safetensors b=B.safetensors c=C.safetensors -o d.safetensors
    surgery vector combine --add math.safetensors --add code.safetensors:0.5 -o both.safetensors
    surgery vector combine "chain + shift" chain=tiny-chain shift=tiny-shift --base tiny-base -o both.safetensors
    """
    if sum(map(bool, (formula, add, analogy))) != 1:
        hint = "As in: surgery vector combine 'a + 0.5*b' a=A.safetensors b=B.safetensors -o OUT."
        raise SurgeryError("Say in one way what is combined: by a formula, by --add, or by --analogy.", hint=hint)
    if formula:
        text, files = formula[0], models.named(formula[1:], "The formula comes first, then a=FILE b=FILE ...")
    elif analogy:
        text, files = "c + (b - a)", dict(zip("abc", analogy, strict=True))
    else:
        text, files = _sum(add or [])
    wanted = formulas.names_in(text, files, "vector")
    if unused := [name for name in files if name not in wanted]:
        raise SurgeryError(f"The formula '{text}' does not use '{unused[0]}'.", hint="Leave it out, or name it there.")
    vectors = {name: models.vector(files[name], base) for name in wanted}
    combined = _filtered(formulas.evaluate(text, vectors, "vector"), only, without)
    given = {"density": density, "rank": rank, "energy": energy, "block": block, "dtype": dtype, "seed": seed}
    _save(combined, out, form, given, threads, force)


@command(app, "export-lora")
def export_lora(
    vector: Vector,
    base: BaseModel,
    out: OutFolder,
    rank: Annotated[int | None, option("The rank of every matrix.")] = None,
    energy: Annotated[float | None, option("Per matrix as few as keep this share of its squared norm.")] = None,
    budget: Annotated[int | None, option("Numbers in the adapter, spent where they keep most.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], option("Type of the stored numbers.")] = "float32",
    whole: Annotated[bool, option("Keep norms too, whole.")] = True,
    seed: Annotated[int, option("Of the randomised SVD.")] = 0,
    threads: Threads = None,
    force: Force = False,
) -> None:
    """Write a vector as a LoRA adapter that PEFT loads, and say how much of it was kept.

    \b
    Examples:
    surgery vector export-lora chain.safetensors tiny-base -o chain-lora --rank 16
    surgery vector export-lora TUNED BASE -o lora --energy 0.9
    """
    taken = models.vector(vector, base)
    with frame.progress("Decomposing") as advance:
        done = taken.export_lora(out, rank=rank, energy=energy, budget=budget, dtype=dtype, whole=whole, seed=seed,
                                 force=force, progress=advance, **frame.threads(threads))  # fmt: skip
    if matrices := [name for name in done.whole if "norm" not in name]:
        frame.notes([f"{', '.join(matrices)} is tied to the head, which PEFT has no low-rank form for: it is kept "
                     "whole (--no-whole leaves it out)."])  # fmt: skip
    if done.left_out:
        frame.notes([f"{frame.count(len(done.left_out), 'tensor')} changed but have no place in a LoRA, and are left "
                     f"out: {', '.join(done.left_out[:6])}"])  # fmt: skip
    value = {"out": str(done.out), "parameters": done.parameters, "energy": done.energy, "ranks": done.ranks,
             "captured": done.captured, "whole": done.whole, "left_out": done.left_out}  # fmt: skip
    ranks = sorted(done.ranks.values())
    told = f"rank {ranks[0]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
    frame.result(value, f"Exported {frame.count(len(ranks), 'matrix')} with {told}: {done.parameters:,} numbers keep "
                        f"{done.energy:.1%} of the squared norm.\nThe adapter is in {done.out}")  # fmt: skip


# ---- arguments -----------------------------------------------------------------------------------------------------


def _filtered(taken: TaskVector, only: list[str] | None, without: list[str] | None) -> TaskVector:
    taken = taken.only(*only) if only else taken
    return taken.without(*without) if without else taken


def _own(vector: str, base: str | None, transfer: bool) -> TaskVector:
    """The vector to apply. On its own base a lossless one needs nothing else; elsewhere it must be made numbers."""
    try:
        return models.vector(vector, base, numbers=transfer)
    except SurgeryError as error:
        if transfer and base is None:
            raise SurgeryError(error.problem, hint="Add --vector-base BASE.") from None
        raise


def _sum(texts: list[str]) -> tuple[str, dict[str, str]]:
    """`FILE` and `FILE:0.5` as a formula; a colon that no number follows belongs to the file's name."""
    files, terms = {}, []
    for i, text in enumerate(texts):
        file, colon, factor = text.rpartition(":")
        try:
            number = float(factor) if colon else 1.0
        except ValueError:
            file, number = text, 1.0
        files[f"v{i}"] = file if colon else text
        terms.append(f"({number!r}) * v{i}")
    return " + ".join(terms), files


def _save(vector: TaskVector, out: Path, form: str, given: dict[str, Any], threads: int | None, force: bool) -> Saved:
    options = {word: value for word, value in given.items() if value is not None}
    for word in options:
        if word not in FORM_OPTIONS[form]:
            fits = [name for name, words in FORM_OPTIONS.items() if word in words]
            raise SurgeryError(f"--{word} means nothing for the form {form}.", hint=f"It goes with {', '.join(fits)}.")
    with frame.progress("Writing") as advance:
        saved = vector.save(out, form, force=force, progress=advance, **frame.threads(threads), **options)
    value: dict[str, Any] = {
        "out": str(saved.path), "form": saved.form, "definition": str(vector), "tensors": len(vector),
        "numbers": saved.numbers, "bytes": saved.nbytes, "seconds": round(saved.seconds, 3),
    }  # fmt: skip
    moved = ""
    if form == "lossless":
        changed = sum(entry["changed"] for entry in saved.notes.values())
        value["changed"] = changed
        moved = f", of which {changed / max(1, saved.numbers):.1%} changed"
    frame.result(value, f"{vector}: {frame.count(len(vector), 'tensor')}, {saved.numbers:,} numbers{moved}; as "
                        f"{form} {frame.size(saved.nbytes)} ({saved.bytes_per_number:.2f} bytes a number) in "
                        f"{frame.seconds(saved.seconds)}.\nThe vector is in {saved.path}")  # fmt: skip
    return saved
