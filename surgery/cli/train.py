"""`surgery train`: a recipe, run and watched."""

from __future__ import annotations

import io
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.cli import frame, planned_run
from surgery.cli.frame import command, option
from surgery.cli.recipes import complete_recipe
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from rich.table import Table

    from surgery.training.panel import Panel
    from surgery.training.recipe import Recipe
    from surgery.training.run import Run

Name = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name that `surgery recipes list` shows.",
                        autocompletion=complete_recipe)
]  # fmt: skip
Changes = Annotated[list[str] | None, option("Change a key of it; repeatable.", "--set", metavar="KEY=VALUE")]
Model = Annotated[str | None, option("Train this model.", metavar="MODEL", default="the recipe's")]
Out = Annotated[
    Path | None, option("Folder of the run.", "--out", "-o", metavar="DIR", default="the recipe's, else runs/NAME")
]
Resume = Annotated[bool, option("Go on from the last checkpoint in that folder, bit for bit.", "--resume")]
PlanOnly = Annotated[bool, option("Only say what would run and the memory it takes.", "--plan", "--dry-run")]


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    command(app, "train")(train)


def train(
    recipe: Name,
    changes: Changes = None,
    model: Model = None,
    out: Out = None,
    resume: Resume = False,
    plan: PlanOnly = False,
) -> None:
    """Train a model by a recipe: on demonstrations, on preferences, or by reinforcement.

    All of the recipe is checked before a model is loaded. Ctrl-C ends the run after the step that it is in, with a
    checkpoint for --resume; a second one ends it at once.

    \b
    Examples:
    surgery train grpo --model tiny-base -o runs/grpo
    surgery train recipe.yaml --set optimizer.lr=1e-4 --set steps=20 --plan
    surgery train recipe.yaml -o runs/mine --resume
    torchrun --nproc_per_node 2 -m surgery.cli train recipe.yaml --set parallel=ddp
    """
    from surgery.training.recipe import load

    with first_speaks():
        words = load(recipe, changes or ())
        words = words.model_copy(update={"model": model or words.model})
        folder = out or words.output or Path("runs") / words.name
        ready = planned_run.ready(words, folder, resume=resume, only=plan)
    if plan:
        frame.result(ready.told, ready.table())
        return
    again = ["surgery", "train", recipe, *(w for change in changes or () for w in ("--set", change))]
    again += ["--model", model] if model else []
    announce(ready.table())
    frame.notes(ready.notes)
    began = time.perf_counter()
    with going_on(again, folder):
        run, warnings = _watched(words, ready, folder, resume)
    _tell(words, run, folder, warnings, time.perf_counter() - began)


@contextmanager
def first_speaks() -> Iterator[None]:
    """Of many processes only the first one speaks, from here on; what is refused inside all of them find."""
    later = int(os.environ.get("RANK", "0")) > 0
    if later:
        frame.STATE.quiet, frame.STATE.json = True, False
    try:
        yield
    except SurgeryError:
        if later:
            raise typer.Exit(2) from None
        raise


def announce(plan: Table) -> None:
    """What will run, where it is not in the way of the outcome."""
    if not (frame.STATE.quiet or frame.STATE.json):
        from rich.console import Console

        Console(stderr=True, width=None if sys.stderr.isatty() else 120).print(plan)


@contextmanager
def going_on(command: list[str], folder: Path) -> Iterator[None]:
    """A run that is stopped inside says by which command it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        step, again = planned_run.last_checkpoint(folder), [*command, "-o", str(folder), "--resume"]
        frame.STATE.on_stop = f"Go on from step {step} with: {shlex.join(again)}" if step else (
            "It had no checkpoint yet: with --resume it begins again.")  # fmt: skip
        raise


def _watched(recipe: Recipe, ready: planned_run.Ready, folder: Path, resume: bool) -> tuple[Run, list[str]]:
    """The finished run, and what it warned of."""
    from surgery.training.run import train as trained

    with watched(recipe, rollouts=ready.samples) as (panel, stepped):

        def on_step(step: int, metrics: dict[str, float]) -> None:
            panel(step, metrics)
            stepped(step)

        found = trained(recipe=recipe, out=folder, resume=resume, parts=ready.parts, on_step=on_step)
        return found, panel.warnings


@contextmanager
def watched(recipe: Any, *, rollouts: bool = False) -> Iterator[tuple[Panel, Callable[[int], None]]]:
    """A panel for a run of `recipe.steps`, and what is called behind each step: Ctrl-C waits for it inside."""
    from surgery.models import no_bars
    from surgery.training.panel import watching

    stream = io.StringIO() if frame.STATE.quiet else sys.stderr
    with no_bars(), _ctrl_c() as stop, watching(recipe, stream=stream, rollouts=rollouts, every=frame.EVERY) as panel:
        yield panel, stop.stepped


@dataclass
class _Stop:
    """Whether Ctrl-C was pressed, and whether there is a step to finish."""

    running: bool = False
    asked: bool = False

    def stepped(self, step: int) -> None:
        """Between two steps all is whole: here a run can end."""
        self.running = step > 0
        if self.asked:
            raise KeyboardInterrupt

    def press(self, *_: Any) -> None:
        """The signal's handler."""
        if self.asked or not self.running:
            raise KeyboardInterrupt
        self.asked = True
        frame.note("Stopping after this step. Ctrl-C again stops at once.")


@contextmanager
def _ctrl_c() -> Iterator[_Stop]:
    """Ctrl-C waits for the step's end inside; not with many processes, which would end at different steps."""
    stop = _Stop()
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not alone or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    usual = signal.signal(signal.SIGINT, stop.press)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, usual)


def _tell(recipe: Recipe, run: Run, folder: Path, warnings: list[str], took: float) -> None:
    """What was done, how long it took, where it is, and how much better the model is."""
    files = {"model": "model", "metrics": "metrics.jsonl", "rollouts": "rollouts.jsonl", "curves": "curves.png",
             "delta": "delta.safetensors"}  # fmt: skip
    there = {what: str(folder / name) for what, name in files.items() if (folder / name).exists()}
    before, *_, after = run.evaluations if len(run.evaluations) > 1 else [{}, {}]
    skipped = sum(m.get("skipped", 0) > 0 for m in run.metrics)
    told = {
        "recipe": recipe.name, "model": str(recipe.model), "steps": recipe.steps, "seconds": round(took, 2),
        "skipped": skipped, "before": before, "after": after, "last": run.last, "warnings": warnings,
        "output": str(folder), "files": there,
    }  # fmt: skip
    done = f"Trained {recipe.model} by {recipe.name}: {frame.count(recipe.steps, 'step')} in {frame.seconds(took)}."
    lines = [done + (f" {frame.count(skipped, 'step')} skipped." if skipped else "")]
    for name in (n for n in after if n != "step" and n in before):
        lines.append(f"Held out, {name}: {before[name]:.3f} before, {after[name]:.3f} after.")
    lines += [f"{what}: {path}" for what, path in there.items()]
    frame.result(told, *lines)
