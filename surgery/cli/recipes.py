"""`surgery recipes`: the training recipes that come with the program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.cli import frame
from surgery.cli.frame import command, new_app, option

if TYPE_CHECKING:
    from surgery.training.recipe import Recipe

app = new_app(help="Training recipes: those that come with the program, and their defaults.")


def complete_recipe(incomplete: str) -> list[str]:
    """Names of packaged recipes, for the shell."""
    from surgery.training.recipe import PACKAGED

    return sorted(file.stem for file in PACKAGED.glob(f"{incomplete}*.yaml"))


@command(app, "list")
def list_() -> None:
    """List the recipes. `surgery train NAME` runs one.

    \b
    Example:
    surgery recipes list
    """
    from surgery.training.recipe import packaged

    rows = [_summary(name, recipe) for name, recipe in packaged().items()]
    if frame.STATE.json or frame.STATE.quiet:
        frame.result(rows)
        return
    from rich.table import Table

    table = Table(title="Recipes")
    for column in ("name", "objective", "source", "paper", "about"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    frame.result(rows, table)


@command(app, "show")
def show(
    name: Annotated[str, typer.Argument(help="One of the list, or a YAML file.", autocompletion=complete_recipe)],
    full: Annotated[bool, option("With every key and its default.", "--full")] = False,
) -> None:
    """Print a recipe as YAML: a file to change and to train by.

    \b
    Examples:
    surgery recipes show grpo > mine.yaml
    surgery recipes show grpo --full
    """
    from pathlib import Path

    import yaml

    from surgery.training.recipe import PACKAGED, as_words, load

    recipe = load(name)  # also checks it, and knows the nearest name
    file = Path(name) if Path(name).is_file() else PACKAGED / f"{name}.yaml"
    words = as_words(recipe)
    text = yaml.safe_dump(words, sort_keys=False, width=100) if full else file.read_text(encoding="utf-8")
    frame.result(words, text.rstrip("\n"))


def _summary(name: str, recipe: Recipe) -> dict[str, str]:
    source = "" if recipe.source is None else _named(recipe.source)
    return {"name": name, "objective": _named(recipe.objective), "source": source, "paper": recipe.paper,
            "about": " ".join(recipe.about.split())}  # fmt: skip


def _named(written: Any) -> str:
    """`grpo` of `{grpo: {beta: 0}}`; parts of a list joined by +."""
    if isinstance(written, list):
        return " + ".join(map(_named, written))
    if isinstance(written, dict):
        return next((str(key) for key in written if key != "weight"), "")
    return str(written)
