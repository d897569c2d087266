"""`surgery zoo`: models that are at hand without a hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from surgery.cli import frame
from surgery.cli.frame import Force, command, new_app

app = new_app(help="Models at hand: the tiny family that comes with the program, and small real ones.")


def _complete_name(incomplete: str) -> list[str]:
    from surgery.zoo import list_models

    return [known.name for known in list_models() if known.name.startswith(incomplete)]


@command(app, "list")
def list_() -> None:
    """List the models of the zoo. Their names stand for models in every command.

    \b
    Example:
    surgery zoo list
    """
    from surgery.zoo import list_models

    known = list_models()
    if frame.STATE.json or frame.STATE.quiet:
        frame.result([asdict(each) for each in known])
        return
    from rich.table import Table

    table = Table(title="Zoo")
    for column in ("name", "numbers", "what", "licence"):
        table.add_column(column, overflow="fold", justify="right" if column == "numbers" else "left")
    for each in known:
        what = each.what + ("" if each.available else f"\nnot here: {each.hint}")
        table.add_row(each.name, f"{each.parameters:,}", what, each.licence)
    frame.result([], table)


@command(app, "get")
def get(
    name: Annotated[str, typer.Argument(autocompletion=_complete_name, help="As `surgery zoo list` shows it.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="Copy it there.")] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="Stored type of a converted model.")
    ] = "bfloat16",
    force: Force = False,
) -> None:
    """Make a model of the zoo ready, and say where it is.

    \b
    Examples:
    surgery zoo get tiny-base -o my-base
    surgery zoo get smollm2
    """
    from surgery.zoo import get as fetch

    folder = fetch(name, out, dtype=dtype, force=force)
    frame.result({"name": name, "path": str(folder)}, str(folder))
