"""`surgery demo`: the whole toolkit on the tiny family, in under a minute."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.cli import frame
from surgery.cli.frame import Force, command, option


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    command(app, "demo")(demo)


def demo(
    out: Annotated[Path, option("Where everything is written.", "--out", "-o", metavar="DIR")] = Path("surgery-demo"),
    force: Force = False,
) -> None:
    """Show what it does on the tiny family: vectors, merges, scores, figures and a report.

    \b
    Example:
    surgery demo -o demo
    """
    from analysis.report import demo as run

    with frame.progress("Demo") as advance:
        found = run(out, force=force, progress=advance)
    frame.result(found.to_dict(), *found.told())
