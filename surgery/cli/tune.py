"""`surgery tune show | select`: what sparse tuning would move, and the memory it takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.cli import frame, planned_run
from surgery.cli.frame import Force, command, new_app, option
from surgery.cli.recipes import complete_recipe
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from rich.table import Table

app = new_app(help="Sparse tuning: which of a model's numbers would move, and the memory that takes.")

Name = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name that `surgery recipes list` shows.",
                        autocompletion=complete_recipe)
]  # fmt: skip
Changes = Annotated[list[str] | None, option("Change a key of it; repeatable.", "--set", metavar="KEY=VALUE")]
Model = Annotated[str | None, option("Of this model.", metavar="MODEL", default="the recipe's")]


@command(app, "show")
def show(recipe: Name, changes: Changes = None, model: Model = None) -> None:
    """Show what a recipe would move and its memory, beside full fine-tuning and a LoRA of equal size.

    Nothing is trained, and of the model only its shapes are read.

    \b
    Examples:
    surgery tune show sft --model tiny-base --set "tuning={lift: {density: 0.05}}"
    surgery tune show recipe.yaml --set tuning=half
    """
    from surgery.training.memory import estimate, lengths, moves
    from surgery.training.plan import plan
    from surgery.training.recipe import load
    from surgery.tuning.plan import Lora

    words = load(recipe, changes or ())
    words = words.model_copy(update={"model": model or words.model})
    if words.model is None:
        raise SurgeryError("The recipe names no model.", hint="Add --model MODEL, for example --model tiny-base.")
    parts = plan(words)
    network = planned_run.empty(words.model)
    tokenizer = planned_run.tokenizer_of(words.model)
    prompt, completion = lengths(words, parts, tokenizer)
    arms: dict[str, Any] = {planned_run.tuned(parts) or "as the recipe says": parts.tuning}
    if parts.tuning is not None:
        arms["all numbers"] = None
        lora = _equal(network, moves(words, parts.tuning, network).numbers)
        if lora is not None and not isinstance(parts.tuning, Lora):
            arms[f"LoRA of rank {lora.rank}"] = lora
    rows = []
    for name, tuning in arms.items():
        parts.tuning = tuning
        memory = estimate(words, network, parts, prompt=prompt, completion=completion).to_dict()
        rows.append({"tuning": name, "numbers": moves(words, tuning, network).numbers} | memory)
    total = sum(p.numel() for p in network.parameters())
    frame.result({"model": str(words.model), "parameters": total, "arms": rows}, _table(rows, str(words.model), total))


def _equal(network: Any, count: int) -> Any:
    """The LoRA of as many numbers; None where rank 1 is too large."""
    from surgery.tuning.decomposed import lora_rank_for
    from surgery.tuning.plan import Lora

    try:
        return Lora(lora_rank_for(network, count))
    except SurgeryError:
        return None


def _table(rows: list[dict[str, Any]], model: str, total: int) -> Table:
    from rich.table import Table

    from surgery.training.memory import size_told

    table = Table(title=f"{model}: {total:,} numbers; memory of a step on one process", title_justify="left")
    shown = {"weights": "weights", "adapter": "adapter", "gradients": "gradients", "moments": "moments",
             "places": "places", "activations": "activations", "peak": "peak"}  # fmt: skip
    table.add_column("tuning", overflow="fold")
    table.add_column("numbers that move", justify="right")
    for title in shown.values():
        table.add_column(title, justify="right")
    for row in rows:
        cells = [size_told(row[key]) if row[key] else "-" for key in shown]
        table.add_row(row["tuning"], f"{row['numbers']:,} ({row['numbers'] / total:.1%})", *cells)
    return table


@command(app, "select")
def select(
    model: Annotated[str, typer.Argument(help="A folder, or a name in the zoo.")],
    out: Annotated[Path, option("The file (.safetensors) to write.", "--out", "-o", metavar="FILE")],
    tuning: Annotated[str, option("What to select, as in a recipe.", metavar="TUNING")] = "lift",
    force: Force = False,
) -> None:
    """Choose the numbers that would move, and write their places to a file.

    Selections by gradients or inputs need data: those are made by `surgery train`.

    \b
    Examples:
    surgery tune select tiny-base -o lift.safetensors
    surgery tune select tiny-base -o ticket.safetensors --tuning "{delta: {sibling: tiny-chain, density: 0.01}}"
    """
    import yaml

    from surgery.models import load as load_model
    from surgery.tuning.plan import Sparse, parse
    from surgery.tuning.selection import Round

    if out.exists() and not force:
        raise SurgeryError(f"{out} exists.", hint="Choose another file, or pass --force.")
    chosen = parse(yaml.safe_load(tuning))
    if not isinstance(chosen, Sparse):
        raise SurgeryError(f"'{tuning}' selects none of the model's own numbers.", hint="lift, magnitude, half, ...")
    network, _ = load_model(model)
    found = chosen.choose(network, Round())
    found.save(out, force=force)
    by_kind = _by_kind(found)
    told = {"selection": found.method, "numbers": found.count, "of": found.total, "density": found.density,
            "tensors": len(found.places), "by_kind": by_kind, "output": str(out)}  # fmt: skip
    shares = ", ".join(f"{kind} {share:.1%}" for kind, share in by_kind.items())
    frame.result(told, f"{found.method}: {found.count:,} of {found.total:,} numbers ({found.density:.2%}) in "
                       f"{frame.count(len(found.places), 'tensor')}.", f"Share of each kind: {shares}.",
                 f"Written to {out}.")  # fmt: skip


def _by_kind(found: Any) -> dict[str, float]:
    """The share that moves of the chosen tensors of each kind."""
    import math

    from surgery.anatomy.names import kind_of

    moving: dict[str, int] = {}
    there: dict[str, int] = {}
    for name in found.places:
        kind = kind_of(name)
        moving[kind] = moving.get(kind, 0) + found.counted(name)
        there[kind] = there.get(kind, 0) + math.prod(found.shapes[name])
    return {kind: moving[kind] / there[kind] for kind in moving}
