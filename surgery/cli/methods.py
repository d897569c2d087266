"""`surgery methods`: the merge methods and their parameters, read without importing torch."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.cli import frame
from surgery.cli.frame import command

if TYPE_CHECKING:
    from rich.table import Table


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    command(app, "methods")(methods)


def methods(name: Annotated[str | None, typer.Argument(help="One of them, with its parameters.")] = None) -> None:
    """List the merge methods, or the parameters of one.

    \b
    Examples:
    surgery methods
    surgery methods breadcrumbs
    """
    from surgery.weights.recipe.signatures import signature_of, signatures

    about = _summaries()
    chosen = [signature_of(name)] if name else [signatures()[n] for n in about if n in signatures()]
    rows = [
        {
            "name": each.method,
            "what": about.get(each.method, {}).get("what", ""),
            "paper": about.get(each.method, {}).get("paper", ""),
            "base": each.base,
            "models": list(each.inputs),
            "parameters": {
                word: {"type": p.type.__name__, "default": "required" if p.required else p.default}
                | ({"choices": list(p.choices)} if p.choices else {})
                | ({"per_input": True} if p.per_input else {})
                for word, p in each.parameters.items()
            },
        }
        for each in chosen
    ]
    frame.result(rows[0] if name else rows, _parameters_table(rows[0]) if name else _methods_table(rows))


def _summaries() -> dict[str, dict[str, str]]:
    """Paper and purpose of every method, from the table that heads the package: importing it would import torch."""
    text = Path(__file__).parents[1].joinpath("weights/methods/__init__.py").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in (ast.get_docstring(ast.parse(text)) or "").splitlines()
            if line.startswith("| ")]  # fmt: skip
    return {row[0].strip(): {"paper": row[1].strip(), "what": row[2].strip()} for row in rows[1:]}


def _methods_table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(title="Merge methods", caption="`surgery methods NAME` shows the parameters of one.")
    for column in ("method", "what it does", "base", "paper"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["name"], row["what"], row["base"], row["paper"])
    return table


def _parameters_table(row: dict[str, Any]) -> Table:
    from rich.table import Table

    fewest, most = row["models"]
    models_ = str(fewest) if most == fewest else f"{fewest} or more" if most is None else f"{fewest} to {most}"
    table = Table(
        title=f"{row['name']}: {row['what']}", caption=f"Models: {models_}. Base: {row['base']}. {row['paper']}"
    )
    for column in ("parameter", "default", "takes"):
        table.add_column(column, overflow="fold")
    for word, p in row["parameters"].items():
        takes = ", ".join(p.get("choices", ())) or p["type"]
        default = "" if p["default"] is None else str(p["default"])
        table.add_row(word, default, takes + (" (one for each model, or one for all)" if p.get("per_input") else ""))
    return table
