"""`surgery merge`: a recipe, or a method and models, carried out."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from surgery.cli import frame, models, planned
from surgery.cli.frame import Force, Threads, command, option
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from surgery.weights.merge import Merged
    from surgery.weights.recipe import Recipe


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    command(app, "merge")(merge)


def _complete_method(incomplete: str) -> list[str]:
    from surgery.weights.recipe.signatures import signatures

    return [name for name in signatures() if name.startswith(incomplete)]


RecipeOrModels = Annotated[list[str], typer.Argument(metavar="RECIPE | MODEL...", help="A recipe (YAML), or models.")]
Out = Annotated[Path | None, option("Where the model is written.", "--out", "-o", metavar="DIR")]
ShowPlan = Annotated[bool, option("Say what would be done, and stop.", "--plan")]
Rounding = Annotated[Literal["nearest", "stochastic"], option("How numbers are rounded when stored.")]
Device = Annotated[str, option("Where the arithmetic is done: cpu, cuda, ...")]
AllowPickle = Annotated[bool, option("Read .bin files too (torch's, with weights_only).", "--allow-pickle")]

_INSTEAD = "Instead of a recipe"
Method = Annotated[str | None, option("See `surgery methods`.", panel=_INSTEAD, autocompletion=_complete_method)]
Base = Annotated[str | None, option("The model that differences are taken from.", panel=_INSTEAD)]
Set = Annotated[
    list[str] | None, option("A parameter of the method; repeatable.", "--set", metavar="NAME=VALUE", panel=_INSTEAD)
]
Weight = Annotated[list[float] | None, option("A model's weight: once for each, in their order.", panel=_INSTEAD)]

_BESIDES = "Besides the recipe, or over what it says"
OutDtype = Annotated[
    Literal["base", "float32", "bfloat16", "float16"] | None,
    option("Type of the stored numbers.", panel=_BESIDES, default="the base's"),
]
Dtype = Annotated[
    Literal["float32", "float64"] | None, option("Type of the arithmetic.", panel=_BESIDES, default="float32")
]
Vocab = Annotated[
    Literal["error", "base", "union", "intersection"] | None,
    option("Which tokens the result has where vocabularies differ.", panel=_BESIDES, default="error"),
]
Missing = Annotated[
    Literal["error", "base", "skip"] | None,
    option("What to do where a model lacks a tensor.", panel=_BESIDES, default="error"),
]
Nonfinite = Annotated[
    Literal["error", "base"] | None, option("What to do with NaN and infinity.", panel=_BESIDES, default="error")
]
Seed = Annotated[int | None, option("Of whatever is drawn at random.", panel=_BESIDES, default="0")]
ShardSize = Annotated[str | None, option("Most bytes of one file.", panel=_BESIDES, metavar="SIZE", default="5GB")]


def merge(
    inputs: RecipeOrModels,
    out: Out = None,
    plan: ShowPlan = False,
    method: Method = None,
    base: Base = None,
    set_: Set = None,
    weight: Weight = None,
    out_dtype: OutDtype = None,
    dtype: Dtype = None,
    vocab: Vocab = None,
    missing: Missing = None,
    nonfinite: Nonfinite = None,
    seed: Seed = None,
    shard_size: ShardSize = None,
    rounding: Rounding = "nearest",
    threads: Threads = None,
    device: Device = "cpu",
    allow_pickle: AllowPickle = False,
    force: Force = False,
) -> None:
    """Merge models: by a recipe (our YAML, or mergekit's), or by a method named here.

    Models are folders, base+adapter, base+delta.safetensors, hub names, or names of the zoo. An interrupted merge
    is taken up again by the same command.

    \b
    Examples:
    surgery merge recipe.yml -o merged
    surgery merge recipe.yml --plan
    surgery merge --method breadcrumbs --base BASE MATH CODE -o merged --set density=0.2
    surgery merge --method task_arithmetic --base tiny-base tiny-chain tiny-shift --weight 0.6 --weight 0.4 -o merged
    """
    keys: dict[str, Any] = {"out_dtype": out_dtype, "dtype": dtype, "vocab": vocab, "missing": missing,
                            "nonfinite": nonfinite, "seed": seed, "shard_size": shard_size}  # fmt: skip
    named = {k: v for k, v in keys.items() if v is not None}
    if method is None:
        recipes = _from_file(inputs, base, set_, weight, named)
    else:
        from surgery.weights.recipe import recipe_from_command

        recipes = [recipe_from_command(method, inputs, base, _assignments(set_ or []), weight or None, **named)]
    recipes = [models.in_recipe(recipe) for recipe in recipes]
    if plan:
        planned.show(recipes, out, threads or os.cpu_count() or 1, force, allow_pickle)
        return
    if out is None:
        raise SurgeryError("No output was named.", hint="Add -o DIR, or --plan to see what would be done.")
    from surgery.weights.merge import merge as carry_out

    frame.STATE.on_stop = "What was written so far is kept: the same command goes on from there."
    with frame.progress("Merging") as advance:
        merged = carry_out(
            recipes, out, threads=threads, device=device, rounding=rounding, force=force, allow_pickle=allow_pickle,
            progress=advance,
        )  # fmt: skip
    frame.notes(merged.notes)
    frame.result(merged.to_dict(), _told(merged))


# ---- recipes -------------------------------------------------------------------------------------------------------


def _from_file(inputs: list[str], base: Any, set_: Any, weight: Any, named: dict[str, Any]) -> list[Recipe]:
    from surgery.weights.recipe import load_recipes
    from surgery.weights.recipe.schema import TokenizerRule

    for word, value in {"base": base, "set": set_, "weight": weight}.items():
        if value:
            hint = "`surgery merge --method ties --base BASE MODEL... -o OUT` needs no recipe."
            raise SurgeryError(f"--{word} goes with --method; with a recipe it is said there.", hint=hint)
    if len(inputs) != 1:
        raise SurgeryError(f"One recipe is carried out at a time, and {len(inputs)} files were named.",
                           hint="To merge models without a recipe, add --method (see `surgery methods`).")  # fmt: skip
    path = Path(inputs[0]).expanduser()
    if path.is_dir():
        raise SurgeryError(f"{path} is a folder, not a recipe.", hint="To merge models without a recipe, add --method.")
    if not path.is_file():
        raise SurgeryError(f"There is no recipe '{path}'.", hint="Check the path, or name models with --method.")
    recipes = load_recipes(path)
    if "vocab" in named:
        rule = None if named["vocab"] == "error" else TokenizerRule(named["vocab"])
        named = {k: v for k, v in named.items() if k != "vocab"} | {"tokenizer": rule}
    return [replace(recipe, **named) for recipe in recipes]


def _assignments(texts: list[str]) -> dict[str, str]:
    out: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise SurgeryError(f"--set takes NAME=VALUE, and '{text}' is not that.", hint="As in --set density=0.2.")
        if name.strip() in out:
            raise SurgeryError(f"--set names '{name.strip()}' twice.")
        out[name.strip()] = value
    return out


def _told(merged: Merged) -> str:
    resumed = f", {merged.resumed} of them from an interrupted run" if merged.resumed else ""
    return (
        f"Merged by {merged.method}: {frame.count(len(merged.tensors), 'tensor')}{resumed}, {merged.numbers:,} "
        f"numbers, {frame.size(merged.nbytes)} in {frame.seconds(merged.seconds)}.\n"
        f"The model is in {merged.out}"
    )
