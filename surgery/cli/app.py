"""The tree of commands, and what `surgery` itself takes."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer

import surgery
from surgery.cli import (
    circuit,
    delta,
    demo,
    evaluate,
    explore,
    generate,
    look,
    merge,
    methods,
    pairs,
    patch,
    recipes,
    rollouts,
    sae,
    train,
    tune,
    zoo,
)
from surgery.cli.frame import Debug, Json, Quiet, new_app, set_global, unwrapped

app = new_app()
app.add_typer(look.app, name="vector")  # the group of vector.py, with `inspect` and `check`
app.add_typer(delta.app, name="delta")
merge.register(app)
methods.register(app)
app.add_typer(zoo.app, name="zoo")
evaluate.register(app)
generate.register(app)
explore.register(app)
patch.register(app)
pairs.register(app)
app.add_typer(circuit.app, name="circuit")
train.register(app)
app.add_typer(tune.app, name="tune")
app.add_typer(sae.app, name="sae")
app.add_typer(recipes.app, name="recipes")
app.add_typer(rollouts.app, name="rollouts")
demo.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"surgery {surgery.__version__}")
        raise typer.Exit()


def surgery_command(
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """What did fine-tuning change in this model, and how do I change it myself?

    Takes the difference between a base model and its fine-tunings out, looks at it, computes with it, and puts it
    into a model. Begin with the small models that come with it:

    \b
    surgery demo
    surgery vector inspect tiny-base tiny-chain tiny-shift
    surgery merge --method ties --base tiny-base tiny-chain tiny-shift -o merged
    """
    set_global(json, quiet, debug)


app.callback(help=unwrapped(inspect.getdoc(surgery_command) or ""))(surgery_command)
