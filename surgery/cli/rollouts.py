"""`surgery rollouts`: what a run's model wrote, and what it was rewarded for."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surgery.cli import frame
from surgery.cli.frame import command, new_app, option
from surgery.errors import SurgeryError
from surgery.registry import nearest

if TYPE_CHECKING:
    from surgery.training.rewards.audit import Audit, Line

app = new_app(help="What a run's model wrote, and what it was rewarded for.")


@command(app, "inspect")
def inspect(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or its rollouts.jsonl.")],
    step: Annotated[int | None, option("Of this step only.", min=1, default="all of them")] = None,
    by: Annotated[str | None, option("Completions by this reward.", metavar="REWARD", default="each in turn")] = None,
    top: Annotated[int, option("Highest completions shown.", min=0)] = 3,
    bottom: Annotated[int, option("Lowest completions shown.", min=0)] = 3,
    plot: Annotated[Path | None, option("Draw a figure.", metavar="FILE.png")] = None,
) -> None:
    """Show the best and worst completions of each reward, what rewards go along with, and groups that teach nothing.

    A reward that goes along with length, or two that go along with each other, may be rewarding something else than was
    meant. `constant groups` is the share whose completions all earned the same.

    \b
    Examples:
    surgery rollouts inspect runs/grpo
    surgery rollouts inspect runs/grpo --step 40 --by accuracy --top 5 --bottom 5 --plot rewards.png
    """
    from surgery.training.rewards.audit import audit_log, summarise

    found = audit_log(run)
    lines = found.lines
    if step is not None:
        steps = sorted({line.step for line in lines})
        lines = [line for line in lines if line.step == step]
        if not lines:
            raise SurgeryError(
                f"{run} has no rollouts of step {step}.", hint=f"It has steps {steps[0]} to {steps[-1]}."
            )
    found = summarise(lines, examples=len(lines))
    if by is not None and by not in found.components:
        raise SurgeryError(f"{run} has no reward '{by}'.", hint=nearest(by, found.components))
    for name, c in found.components.items():
        n, m = (top, bottom) if by in (None, name) else (0, 0)
        found.components[name] = replace(c, top=_distinct(c.top, n), bottom=_distinct(c.bottom, m))
    told = {**found.to_dict(), "run": str(run), "step": step}
    del told["lines"]  # they are in the log
    written = ""
    if plot is not None:
        from surgery.training.curves import rewards_figure

        plot.parent.mkdir(parents=True, exist_ok=True)
        rewards_figure(found).savefig(plot, dpi=110)
        told["written"] = [str(plot)]
        written = f"Written: {plot}"
    frame.result(told, _text(found, max(top, bottom)) + written)


def _distinct(lines: list[Line], n: int) -> list[Line]:
    """The first `n` that are not the same text again."""
    return list({(line.prompt, line.completion): line for line in reversed(lines)}.values())[::-1][:n]


def _text(found: Audit, examples: int) -> str:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 120
    return found.render(examples=examples, width=width, few=0)
