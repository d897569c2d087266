"""`surgery tune list | show | select`: what sparse tuning would move, and the memory it takes."""

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


@command(app, "list")
def list_(name: Annotated[str | None, typer.Argument(help="One of them, with its options.")] = None) -> None:
    """List what a recipe may say under `tuning:`, or the options of one.

    \b
    Examples:
    surgery tune list
    surgery tune list lift
    surgery train sft --set "tuning={lift: {density: 0.05}}"
    """
    from surgery.tuning.plan import NAMES, options

    rows = [{"name": n, "what": _sentence(NAMES.lookup(n)), "options": options(n)} for n in ([name] if name else NAMES)]
    frame.result(rows[0] if name else rows, _options_table(rows[0]) if name else _names_table(rows))


def _sentence(kind: Any) -> str:
    """The first one of what a class says of itself, on one line."""
    return " ".join((kind.__doc__ or "").partition("\n\n")[0].split())


def _names_table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(title="What `tuning:` may be", caption="`surgery tune list NAME` shows the options of one.")
    table.add_column("name")
    table.add_column("what moves")
    for row in rows:
        table.add_row(row["name"], row["what"])
    return table


def _options_table(row: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=f"{row['name']}: {row['what']}", title_justify="left")
    for column in ("option", "default", "takes"):
        table.add_column(column, overflow="fold")
    for word, (takes, usual) in row["options"].items():
        table.add_row(word, usual, takes)
    return table


@command(app, "show")
def show(recipe: Name, changes: Changes = None, model: Model = None) -> None:
    """Show what a recipe would move and its memory, beside full fine-tuning and a LoRA of equal size.

    Nothing is trained, and of the model only its shapes are read (its weights, for a threshold).
    `surgery tune list` shows what there is to choose.

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
    network = planned_run.sized(words.model, parts)
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
    if parts.tuning is None and len(rows) == 1:
        frame.note(
            "The recipe has no `tuning:`; `surgery tune list` shows what it may be, for example --set tuning=lift."
        )


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
    """Choose the numbers that would move, and write their places to a file that `tuning:` in a recipe takes.

    Selections by gradients or inputs need data: those are made by `surgery train`.

    \b
    Examples:
    surgery tune select tiny-base -o lift.safetensors
    surgery train sft --model tiny-base --set tuning=lift.safetensors -o run
    surgery tune select tiny-base -o ticket.safetensors --tuning "{delta: {sibling: tiny-chain, density: 0.01}}"
    """
    import yaml

    from surgery.models import load as load_model
    from surgery.models import no_bars
    from surgery.tuning.plan import Sparse, parse
    from surgery.tuning.selection import Round

    if out.suffix != ".safetensors":
        raise SurgeryError(f"'{out}' is no name for a selection.", hint="It ends in .safetensors.")
    if out.exists() and not force:
        raise SurgeryError(f"{out} exists.", hint="Choose another file, or pass --force.")
    if not out.parent.is_dir():
        raise SurgeryError(f"There is no folder {out.parent}.", hint=f"mkdir -p {out.parent}")
    try:
        chosen = parse(yaml.safe_load(tuning))
    except yaml.YAMLError as error:
        raise SurgeryError(f"--tuning {tuning} is not YAML: {str(error).splitlines()[0]}.",
                           hint='--tuning "{lift: {density: 0.05}}"') from None  # fmt: skip
    if not isinstance(chosen, Sparse):
        raise SurgeryError(f"'{tuning}' selects none of the model's own numbers.", hint="lift, magnitude, half, ...")
    if set(chosen.selector.needs) - {"sibling"}:
        raise SurgeryError(f"The selection '{chosen.name}' looks at data, and there are none here.",
                           hint=f'A run makes it on its own: surgery train RECIPE --set "tuning={tuning}"')  # fmt: skip
    with no_bars():
        network, _ = load_model(model)
    found = chosen.choose(network, Round())
    found.save(out, force=force)
    by_kind = _by_kind(found, network)
    told = {"selection": found.method, "numbers": found.count, "of": found.total, "density": found.density,
            "tensors": len(found.places), "by_kind": by_kind, "output": str(out)}  # fmt: skip
    shares = ", ".join(f"{kind} {share:.1%}" for kind, share in by_kind.items())
    frame.result(told, f"{found.method}: {found.count:,} of {found.total:,} numbers ({found.density:.2%}) in "
                       f"{frame.count(len(found.places), 'tensor')}.", f"Share of each kind: {shares}.",
                 f"Written to {out}.")  # fmt: skip


def _by_kind(found: Any, network: Any) -> dict[str, float]:
    """The share that moves of the model's tensors of each kind."""
    from surgery.anatomy.names import kind_of

    moving: dict[str, int] = {}
    there: dict[str, int] = {}
    for name, parameter in network.named_parameters():
        kind = kind_of(name)
        moving[kind] = moving.get(kind, 0) + (found.counted(name) if name in found else 0)
        there[kind] = there.get(kind, 0) + parameter.numel()
    return {kind: count / there[kind] for kind, count in moving.items() if count}
