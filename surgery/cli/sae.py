"""`surgery sae train | measure | features | convert | list`: dictionaries of a model's activations, or of a pair's."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from surgery.cli import frame, planned_run, sae_features, sae_tune
from surgery.cli.frame import Force, command, new_app, option
from surgery.cli.train import Out, PlanOnly, Resume, announce, first_speaks, going_on, watched
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from rich.table import Table

    from surgery.sae.evaluation import Measured
    from surgery.sae.recipe import Recipe
    from surgery.sae.run import Run

app = new_app(help="Sparse autoencoders, transcoders and crosscoders: what is in a model's activations, or a pair's.")


def _recipes(incomplete: str) -> list[str]:
    folder = Path(__file__).parents[1] / "sae" / "recipes"
    return sorted(file.stem for file in folder.glob(f"{incomplete}*.yaml"))


Name = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name that `surgery sae list` shows.",
                        autocompletion=_recipes)
]  # fmt: skip
Changes = Annotated[list[str] | None, option("Change a key of it; repeatable.", "--set", metavar="KEY=VALUE")]
Models = Annotated[list[str] | None, option("Read this model; twice: base and tuned, for a crosscoder.", "--model",
                                            metavar="MODEL", default="the recipe's")]  # fmt: skip
Data = Annotated[
    str | None, option("Texts, to be named: a file, a task, or as `data` in a recipe.", metavar="DATA", default="none")
]


@command(app, "train")
def train(
    recipe: Name,
    changes: Changes = None,
    models: Models = None,
    out: Out = None,
    resume: Resume = False,
    plan: PlanOnly = False,
) -> None:
    """Train dictionaries by a recipe: several of them over one stream of activations.

    All of the recipe is checked before a model is loaded. Ctrl-C ends the run after the step that it is in, with a
    checkpoint for --resume; a second one ends it at once. Several processes share the reading and the dictionaries.

    \b
    Examples:
    surgery sae train dictionary -o runs/dictionary
    surgery sae train crosscoder --model tiny-base --model tiny-chain --set data=chain --plan
    surgery sae train recipe.yaml -o runs/mine --resume
    torchrun --nproc_per_node 2 -m surgery.cli sae train sweep -o runs/sweep
    """
    from surgery.sae.recipe import load
    from surgery.sae.run import check_folder

    with first_speaks():
        words = load(recipe, changes or ())
        if models:
            words = words.model_copy(update={"model": _named(models, words)})
        folder = out or words.output or Path("runs") / words.name
        if not plan:
            check_folder(folder, resume)
        told = _planned(words, folder, resume)
    if plan:
        frame.result(told, _table(told))
        return
    again = ["surgery", "sae", "train", recipe, *(w for change in changes or () for w in ("--set", change))]
    again += [w for model in models or () for w in ("--model", model)]
    announce(_table(told))
    began = time.perf_counter()
    with going_on(again, folder):
        run, warnings = _watched(words, folder, resume)
    _tell(words, run, folder, warnings, time.perf_counter() - began)


def _named(models: list[str], recipe: Recipe) -> str | list[str]:
    """What --model names, for `model` of the recipe. Raises `SurgeryError` where a pair's recipe gets one model."""
    if len(models) < len(recipe.models):
        raise SurgeryError(f"{recipe.name} reads {len(recipe.models)} models, and --model names {len(models)}.",
                           hint="Name base and tuned: --model BASE --model TUNED.")  # fmt: skip
    return models if len(models) > 1 else models[0]


def _watched(recipe: Recipe, folder: Path, resume: bool) -> tuple[Run, list[str]]:
    """The finished run, and what it warned of."""
    from surgery.sae.run import train as trained

    with watched(recipe) as (panel, stepped):

        def on_step(step: int, metrics: dict[str, float]) -> None:
            panel(step, metrics)
            stepped(step)

        return trained(recipe, out=folder, resume=resume, on_step=on_step), panel.warnings


def _planned(recipe: Recipe, folder: Path, resume: bool) -> dict[str, Any]:
    """What would run, and its memory, from configs alone. Raises `SurgeryError` for models and sites that are not."""
    from surgery.anatomy import Anatomy
    from surgery.sae.text import check, text_rows
    from surgery.training.data import kept_out

    if None in recipe.models:
        raise SurgeryError("The recipe names no model.", hint="Add --model MODEL, for example --model tiny-base.")
    rows = text_rows(recipe.data, recipe.folder, recipe.seed)
    check(rows, recipe.reading)
    if recipe.evaluate.sequences:
        kept_out(rows, rows, recipe.reading.held_out)
    networks = [planned_run.empty(name) for name in recipe.models]
    anatomy, *others = [Anatomy(network) for network in networks]
    for each in (anatomy, *others):
        each.expand(recipe.sites)
    many = 1 if recipe.difference else len(networks)
    numbers = {}
    for name, one in recipe.dictionaries.items():
        d_in, d_out = (many * anatomy.width_of(site) for site in (one.site, one.target or one.site))
        numbers[name] = one.latents * (d_in + d_out + 1) + d_out + (d_in * d_out if one.skip else 0)
    size = 2 if recipe.precision == "bfloat16" else 4
    row = sum(many * anatomy.width_of(site) for site in recipe.sites) * 4
    memory = {
        "models": size * sum(p.numel() for network in networks for p in network.parameters()),
        "dictionaries": 16 * sum(numbers.values()),  # weights, gradients, two moments
        "buffer": 0 if recipe.cache else row * recipe.buffer,
    }
    return {
        "recipe": recipe.name,
        "models": [str(name) for name in recipe.models],
        "data": f"{'rows without end' if rows.size == float('inf') else frame.count(int(rows.size), 'row')}",
        "dictionaries": {name: _described(one, numbers[name]) for name, one in recipe.dictionaries.items()},
        "updates": f"{frame.count(recipe.steps, 'step')} of {recipe.rows:,} activations; seed {recipe.seed}",
        "memory": memory | {"in all": sum(memory.values())},
        "output": f"{folder}" + (_going_on(folder) if resume else ""),
    }


def _going_on(folder: Path) -> str:
    step = planned_run.last_checkpoint(folder)
    return f" (going on from step {step:,})" if step else " (no checkpoint there: from the beginning)"


def _described(one: Any, numbers: int) -> str:
    from surgery.sae.recipe import rule_of

    to = f" to {one.target}" if one.target else ""
    return f"{one.site}{to}, {one.latents:,} latents, {rule_of(one.rule)}, {numbers:,} numbers"


def _table(told: dict[str, Any]) -> Table:
    from rich.table import Table

    from surgery.training.memory import size_told

    table = Table(title=f"Recipe: {told['recipe']}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in told.items():
        if name == "memory":
            value = ", ".join(f"{what} {size_told(size)}" for what, size in value.items())
        elif isinstance(value, dict):
            value = "\n".join(f"{what}: {each}" for what, each in value.items())
        elif isinstance(value, list):
            value = ", ".join(value)
        if name != "recipe":
            table.add_row(name, value)
    return table


def _tell(recipe: Recipe, run: Run, folder: Path, warnings: list[str], took: float) -> None:
    """What was done, how long it took, where it is, and what the dictionaries are worth."""
    names = ("dictionaries", "quality.json", "metrics.jsonl", "curves.png", "density.png")
    files = {Path(name).stem: str(folder / name) for name in names if (folder / name).exists()}
    told = {
        "recipe": recipe.name, "steps": recipe.steps, "seconds": round(took, 2), "warnings": warnings,
        "quality": {name: _plain(each.to_dict()) for name, each in run.quality.items()}, "last": run.metrics[-1],
        "output": str(folder), "files": files,
    }  # fmt: skip
    done = f"Trained {frame.count(len(run.dictionaries), 'dictionary')} by {recipe.name}: "
    done += f"{frame.count(recipe.steps, 'step')} in {frame.seconds(took)}."
    shown = [quality_table(run.quality)] if run.quality else []
    frame.result(told, done, *shown, *(f"{what}: {path}" for what, path in files.items()))


def quality_table(found: dict[str, Measured], title: str = "On held-out text") -> Table:
    """One row a dictionary."""
    from rich.table import Table

    table = Table(title=title, title_justify="left",
                  caption="CE and KL recovered: with zeros (or the mean) in place of the activations as 0, the model "
                          "as it is as 1; of several models the least.")  # fmt: skip
    table.add_column("dictionary")
    heads = ("unexplained", "codes a row", "never used", "length kept", "CE recovered (mean)", "KL recovered (mean)")
    for head in heads:
        table.add_column(head, justify="right")
    for name, each in found.items():
        q = each.quality
        cells = [f"{q.fvu:.1%}", f"{q.l0:.1f}", f"{q.dead:.1%}", f"{q.shrinkage:.3f}"]
        for what in ("ce_recovered", "kl_recovered"):
            least = {how: min(getattr(loss, what) for loss in losses) for how, losses in each.losses.items()}
            cells.append(f"{least['zero']:.3f} ({least['mean']:.3f})" if least else "-")
        table.add_row(name, *cells)
    return table


def _plain(value: Any) -> Any:
    from surgery.sae.evaluation import plain

    return plain(value)


@command(app, "measure")
def measure(
    dictionary: Annotated[Path, typer.Argument(help="Folder of a dictionary, of any format.")],
    models: Annotated[
        list[str] | None,
        option("The model it reads; twice: base and tuned.", "--model", metavar="MODEL", default="that of its file"),
    ] = None,
    data: Data = None,
    site: Annotated[str | None, option("Where it reads, as resid_post.6.", default="that of its file")] = None,
    sequences: Annotated[int, option("Sequences of text.", min=1)] = 64,
    context: Annotated[
        int | None, option("Tokens of a sequence.", min=2, default="as in its training, else 256")
    ] = None,
    precision: Annotated[Literal["float32", "bfloat16"], option("Of the model.")] = "float32",
) -> None:
    """Measure a dictionary on text: unexplained variance, codes a row, and what the model loses with it.

    \b
    Examples:
    surgery sae measure runs/dictionary/dictionaries/middle --data chain
    surgery sae measure sae_folder --model smollm2 --site resid_post.14 --data "{file: texts.jsonl}"
    """  # fmt: skip
    import yaml

    from surgery.sae.evaluation import measured
    from surgery.sae.formats import load
    from surgery.sae.source import opened
    from surgery.sae.text import Reading, Text, text_rows
    from surgery.training.recipe import checked

    loaded, about = load(dictionary)
    named = models or about.get("models") or []
    place = site or about.get("site")
    if not named or not place:
        raise SurgeryError(f"{dictionary} does not say {'which model' if not named else 'where'} it reads.",
                           hint="Add --model MODEL." if not named else "Add --site resid_post.6.")  # fmt: skip
    if data is None:
        raise SurgeryError("There is no text to measure it on.", hint="--data texts.txt, or --data chain")
    target = None if site else about.get("target")
    many = 2 if about.get("difference") else loaded.models
    if len(named) != many:
        hint = "--model BASE --model TUNED" if many == 2 else "Name each that it reads."
        raise SurgeryError(
            f"{dictionary} reads {frame.count(many, 'model')}, and --model names {len(named)}.", hint=hint
        )
    networks, tokenizer = opened(list(named), precision)
    told: dict[str, Any] = about.get("reading") or {}
    reading = checked(Reading, told | ({"context": context} if context else {}))
    text = Text(text_rows(yaml.safe_load(data), Path(".")), tokenizer, reading)
    found = measured({dictionary.name: loaded}, networks, text.first(sequences), place, target, tokenizer=tokenizer,
                     difference=bool(about.get("difference")), longest=reading.longest)  # fmt: skip
    result = {"dictionary": str(dictionary), "models": list(named), "site": place}
    frame.result(result | _plain(found[dictionary.name].to_dict()), quality_table(found, f"On {data}"))


@command(app, "convert")
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of a dictionary.")],
    out: Annotated[Path, option("Folder to write.", "--out", "-o", metavar="DIR")],
    format: Annotated[str, option("surgery, saelens, sparsify or dictionary_learning.", "--format", "-f")],
    given: Annotated[str | None, option("Format of the source.", "--from", default="found out")] = None,
    allow_pickle: Annotated[bool, option("Read or write dictionary_learning's ae.pt.", "--allow-pickle")] = False,
    force: Force = False,
) -> None:
    """Write a dictionary in another package's format.

    \b
    Examples:
    surgery sae convert runs/dictionary/dictionaries/middle -o for_saelens --format saelens
    surgery sae convert theirs -o ours --format surgery
    """
    from surgery.sae.formats import load, save

    loaded, about = load(source, given, allow_pickle=allow_pickle)
    if format == "saelens" and "site" in about and "hook_name" not in about:
        about = about | {"hook_name": _lens_name(about["site"])}
    save(loaded, out, format, metadata=about, force=force, allow_pickle=allow_pickle)
    told = {"source": str(source), "format": format, "dictionary": repr(loaded), "output": str(out)}
    frame.result(told, f"{loaded!r} in {format}'s format: {out}")


def _lens_name(site: str) -> str:
    """TransformerLens's name of a site; the site as it is where there is none."""
    from surgery.anatomy import Site
    from surgery.anatomy.sites import lens_name

    return lens_name(Site.parse(site)) or site


@command(app, "list")
def list_(name: Annotated[str | None, typer.Argument(help="One of them: settings, or the recipe.")] = None) -> None:
    """List what makes a dictionary sparse, with its settings, and the recipes that come with the package.

    \b
    Examples:
    surgery sae list
    surgery sae list batchtopk
    surgery sae list crosscoder > mine.yaml
    """
    from surgery.sae.recipe import PACKAGED, packaged
    from surgery.sae.rules import RULES

    if name in _recipes(""):
        text = (PACKAGED / f"{name}.yaml").read_text(encoding="utf-8")
        frame.result({"recipe": name, "yaml": text}, text.rstrip())
        return
    rules = [_rule(each, RULES.lookup(each)) for each in ([name] if name else RULES)]
    if name:
        frame.result(rules[0], f"{name}: {rules[0]['what']}", *(f"  {k}: {v}" for k, v in rules[0]["settings"].items()))
        return
    recipes = {each: recipe.about for each, recipe in packaged().items()}
    frame.result({"rules": rules, "recipes": recipes}, _names("Rules", {r["name"]: r["what"] for r in rules}),
                 _names("Recipes", recipes))  # fmt: skip


def _rule(name: str, kind: Any) -> dict[str, Any]:
    fields = {key: field.default for key, field in kind.__dataclass_fields__.items()}
    return {"name": name, "what": " ".join((kind.__doc__ or "").partition("\n\n")[0].split()), "settings": fields}


def _names(title: str, rows: dict[str, str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for each, what in rows.items():
        table.add_row(each, what)
    return table


sae_features.register(app)
sae_tune.register(app)
