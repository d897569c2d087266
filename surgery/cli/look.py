"""`surgery vector inspect | check`: looking at vectors and models without changing anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from surgery.cli import frame, models
from surgery.cli.frame import Threads, command, option
from surgery.cli.vector import app
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from analysis.geometry import Geometry


@command(app, "inspect")
def inspect(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="BASE TUNED... | VECTOR...", help="A base and its fine-tunings, or vectors and --base."),
    ],
    base: Annotated[str | None, option("The base of stored vectors.")] = None,
    by: Annotated[Literal["module", "layer", "tensor", "total"], option("What a row of the table is.")] = "module",
    density: Annotated[float, option("Share of the largest numbers that overlap and trimming look at.")] = 0.2,
    spectra: Annotated[bool, option("Singular values of every matrix too (slow).", "--spectra")] = False,
    plot: Annotated[Path | None, option("Write figures (PNG) there.", metavar="DIR")] = None,
    save: Annotated[Path | None, option("Write all numbers there (JSON and safetensors).", metavar="FILE")] = None,
    threads: Threads = None,
) -> None:
    """Show what fine-tunings changed: how much, where, and how their changes lie to each other.

    \b
    Examples:
    surgery vector inspect tiny-base tiny-chain tiny-shift
    surgery vector inspect BASE MATH CODE --by layer --spectra --plot figures
    surgery vector inspect math.safetensors code.safetensors --base BASE
    """
    if base is None:
        if models.is_vector(inputs[0]):
            raise SurgeryError(f"{inputs[0]} is a stored vector: its base is needed as well.", hint="Add --base BASE.")
        base, *inputs = inputs
        if not inputs:
            raise SurgeryError(f"Only the base was named: {base}.", hint="Add fine-tunings: inspect BASE TUNED...")
    from analysis.geometry import geometry
    from surgery.checkpoint import open_checkpoint

    opened = open_checkpoint(models.model(base))
    members = [models.vector(spec, base) if _is_difference(spec) else models.model(spec) for spec in inputs]
    total = sum(info.numel for info in opened.tensors.values() if info.is_float)
    with frame.progress("Measuring") as advance:
        done = 0

        def count(numbers: int) -> None:
            nonlocal done
            done += numbers
            advance(done, total)

        found = geometry(
            opened, dict(zip(models.labels(inputs), members, strict=True)), density=density, spectra=spectra,
            progress=count, **frame.threads(threads),
        )  # fmt: skip
    written = [] if plot is None else _figures(found, plot)
    if save is not None:
        written.append(found.save(save))
    value = found.to_dict() | {"written": [str(path) for path in written]}
    if by != "total":
        value[by] = found.to_dataframe(by).to_dict("records")
    lines: list[Any] = [*found.summary(), found.table(by), f"Measured in {frame.seconds(found.seconds)}."]
    if written:
        lines.append("Written: " + ", ".join(map(str, written)))
    frame.result(value, *lines)


@command(app, "check")
def check(
    base: Annotated[str, typer.Argument(help="The model that the others should stem from.")],
    tuned: Annotated[list[str], typer.Argument(help="Models to be merged, or to take vectors from.")],
    fast: Annotated[bool, option("Look at headers and configs only, not at the numbers.", "--fast")] = False,
    sample: Annotated[int | None, option("Most numbers to read of each tensor.", min=1, default="all")] = None,
    threads: Threads = None,
) -> int:
    """Say whether models belong together; the exit code is 0 when they do, and 1 when they don't.

    \b
    Examples:
    surgery vector check BASE MATH CODE
    surgery vector check tiny-base tiny-chain --fast
    """
    from surgery.checkpoint import open_checkpoint
    from surgery.weights.compatibility import check as examine

    opened = [open_checkpoint(models.model(spec)) for spec in (base, *tuned)]
    with frame.progress("Checking") as advance:
        report = examine(
            opened[0], opened[1:], data=not fast, sample=sample, progress=advance, **frame.threads(threads)
        )
    frame.result(report.to_dict(), *([] if frame.STATE.json or frame.STATE.quiet else [report.table()]))
    return report.exit_code


def _is_difference(spec: str) -> bool:
    """Whether it has to be made a vector first: stored vectors and adapters. Models are subtracted while measured."""
    return models.is_vector(spec) or (Path(spec).expanduser() / "adapter_config.json").is_file()


def _figures(found: Geometry, folder: Path) -> list[Path]:
    """Every figure that this geometry has the numbers for; heat maps for each vector."""
    from analysis.plots import save

    kinds = [
        "ulps",
        *(["cosine", "conflict"] if len(found.labels) > 1 else []),
        *(["spectrum"] if found.spectra else []),
    ]
    written = [save(found.plot(kind), folder / f"{kind}.png") for kind in kinds]
    return written + [
        save(found.plot("heat map", vector=label), folder / f"heat_map_{label.replace('/', '-').replace(' ', '_')}.png")
        for label in found.labels
    ]
