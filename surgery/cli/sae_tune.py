"""`surgery sae tune`: SAE-tuning beside all of its controls."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.cli import frame, planned_run
from surgery.cli.frame import Force, command, option
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from rich.table import Table

    from surgery.sae.tune_recipe import Recipe
    from surgery.sae.tune_run import Outcome


def _recipes(incomplete: str) -> list[str]:
    folder = Path(__file__).parents[1] / "sae" / "recipes" / "tuning"
    return sorted(file.stem for file in folder.glob(f"{incomplete}*.yaml"))


Name = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the packaged recipe `sums`.", autocompletion=_recipes)
]
Changes = Annotated[list[str] | None, option("Change a key of it; repeatable.", "--set", metavar="KEY=VALUE")]
Out = Annotated[
    Path | None, option("Folder of the runs.", "--out", "-o", metavar="DIR", default="the recipe's, else runs/NAME")
]
PlanOnly = Annotated[bool, option("Only say what would run.", "--plan", "--dry-run")]


def register(app: typer.Typer) -> None:
    """Adds the command to the group."""
    command(app, "tune")(tune)


def tune(
    recipe: Name, changes: Changes = None, out: Out = None, force: Force = False, plan: PlanOnly = False
) -> int | None:
    """Tune a model behind a dictionary of a better one (SAE-tuning), beside all controls of the recipe.

    Every arm is trained with every seed, and scored on held-out rows: what of the source's lead does it recover?
    Ctrl-C keeps what is finished; the same command goes on from there.

    \b
    Examples:
    surgery sae tune sums --plan
    surgery sae tune recipe.yaml --set tuning.steps=100 -o runs/tuning
    """
    from surgery.sae.tune_recipe import load

    words = load(recipe, changes or ())
    folder = out or words.output or Path("runs") / words.name
    told = planned(words)
    if plan:
        frame.result(told, _plan_table(told))
        return None
    again = ["surgery", "sae", "tune", recipe, *(w for change in changes or () for w in ("--set", change))]
    frame.STATE.on_stop = f"What is finished is kept. Go on with: {shlex.join([*again, '-o', str(folder)])}"
    found, took = _run(words, folder, force)
    frame.STATE.on_stop = None
    numbers = summary(found)
    result = {"recipe": words.name, **numbers, "seconds": round(took, 2), "output": str(folder)}
    runs = frame.count(len(words.arms) * len(words.seeds), "run")
    frame.result(
        result, _table(numbers, words), f"{runs} in {frame.seconds(took)}.",
        f"result: {folder / 'result.json'}", f"adapters: {folder / 'adapters'} (a model: {words.target}+ADAPTER)",
    )  # fmt: skip
    return None


def _run(words: Recipe, folder: Path, force: bool) -> tuple[Outcome, float]:
    """Everything, with progress."""
    from analysis.evaluate import evaluate
    from surgery.models import no_bars
    from surgery.sae.tune_run import run

    settings, began = words.evaluate, time.perf_counter()

    def score(model: Any, tokenizer: Any, rows: Any) -> Any:
        return evaluate(
            model, rows, tokenizer=tokenizer, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size,
            chat=settings.chat,
        ).values  # fmt: skip

    with no_bars(), frame.progress("tuning") as advance:
        found = run(words, score, out=folder, force=force, on_run=lambda done, of, name: advance(name, done, of))
    return found, time.perf_counter() - began


def summary(found: Outcome) -> dict[str, Any]:
    """Accuracy of each arm over its seeds, and the share of the source's lead that it recovers, with its interval."""
    from analysis.comparison import compare
    from analysis.results import Result, stack

    target, source = (sum(values) / len(values) for values in (found.target, found.source))
    arms: dict[str, Any] = {}
    for name, by in found.arms.items():
        own = stack({seed: Result.of(values) for seed, values in by.items()}, "seed")
        before = stack({seed: Result.of(found.target) for seed in by}, "seed")
        gain, lead = compare(own, before), source - target
        ends = {"mean": gain.difference, "low": gain.low, "high": gain.high}
        arms[name] = {**found.chosen[name], "accuracy": float(own.values.mean()),
                      "recovered": {k: v / lead for k, v in ends.items()} if lead else None}  # fmt: skip
    return {"target": target, "source": source, "arms": arms, "dictionaries": found.dictionaries}


def _table(numbers: dict[str, Any], words: Recipe) -> Table:
    from rich.table import Table

    ends = f"target {numbers['target']:.3f}, source {numbers['source']:.3f}"
    table = Table(title=f"{words.name}: {ends}, {frame.count(len(words.seeds), 'seed')}", title_justify="left")
    for column in ("arm", "accuracy", "recovered of the source's lead", "site", "learning rate"):
        table.add_column(column, overflow="fold")
    for name, arm in numbers["arms"].items():
        share = arm["recovered"]
        told = "" if share is None else f"{share['mean']:.2f} [{share['low']:.2f}, {share['high']:.2f}]"
        table.add_row(name, f"{arm['accuracy']:.3f}", told, arm["site"] or "", f"{arm['lr']:g}" if arm["lr"] else "")
    return table


# ---- before anything is loaded


def planned(words: Recipe) -> dict[str, Any]:
    """What would run, from shapes alone. Raises `SurgeryError` for models and sites that don't fit."""
    from surgery.anatomy import Site, num_layers
    from surgery.sae.text import text_rows
    from surgery.sae.tune_arms import ARMS
    from surgery.sae.tune_run import check_texts
    from surgery.tuning.decomposed import lora_size

    check_texts(words)
    if words.evaluate.data is not None:
        text_rows(words.evaluate.data, words.folder)
    target, source = planned_run.empty(words.target), planned_run.empty(words.source)
    shapes = [tuple(m.get_input_embeddings().weight.shape) for m in (target, source)]
    if shapes[0] != shapes[1]:
        both = zip((words.target, words.source), shapes, strict=True)
        told = " and ".join(f"{name} has {tokens:,} tokens of width {width}" for name, (tokens, width) in both)
        raise SurgeryError(f"{told}.", hint="Source and target are of one family.")
    layers = num_layers(dict(target.named_parameters()))
    for site in words.sites:
        if (Site.parse(site).layer or 0) >= layers:
            raise SurgeryError(f"{words.target} has no '{site}': its {layers} layers count from 0.")
    adapter, choices = words.tuning.adapter, {arm: len(words.choices(arm)) for arm in words.arms}
    sweep = sum(n for n in choices.values() if n > 1) * len(words.sweep.seeds)
    return {
        "target": str(words.target), "source": str(words.source), "layers": layers, "sites": words.sites,
        "learning_rates": words.tuning.rates, "steps": words.tuning.steps, "rows": words.tuning.rows,
        "lora": lora_size(target, adapter.rank, adapter.modules), "of": sum(p.numel() for p in target.parameters()),
        "arms": {arm: ARMS[arm].what for arm in words.arms}, "seeds": words.seeds,
        "runs": {"to choose": sweep, "reported": len(words.arms) * len(words.seeds)},
    }  # fmt: skip


def _plan_table(told: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=f"SAE-tuning of {told['target']} by {told['source']}", show_header=False, title_justify="left")
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    for name, what in told["arms"].items():
        table.add_row(name, what)
    rates = ", ".join(f"{rate:g}" for rate in told["learning_rates"])
    table.add_row("sites", ", ".join(told["sites"]))
    table.add_row("learning rates", rates)
    table.add_row("LoRA", f"{told['lora']:,} numbers beside the model's {told['of']:,}")
    steps = f"{frame.count(told['steps'], 'step')} of {frame.count(told['rows'], 'sequence')}"
    table.add_row("runs", f"{told['runs']['to choose']} to choose, {told['runs']['reported']} reported, each {steps}")
    return table
