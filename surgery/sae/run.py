"""`train`: from a recipe to dictionaries on disk, in one call.

    run = train(model="tiny-chain", data="chain", dictionaries={"a": {"site": "resid_post.2", "latents": 512}},
                steps=500, rows=512, out="runs/a")
    run.dictionaries["a"], run.quality["a"], run.plot()

out/recipe.json     the recipe                     out/metrics.jsonl      a line a step
out/dictionaries/a  each dictionary, our format    out/quality.json       each of them on held-out text
out/checkpoint-...  what `resume` starts from      out/curves.png, density.png, density.safetensors
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError
from surgery.sae import formats
from surgery.sae.checkpoints import Checkpoints
from surgery.sae.dictionary import Dictionary
from surgery.sae.evaluation import Measured, plain
from surgery.sae.recipe import Recipe, check, make
from surgery.sae.source import Source, opened
from surgery.sae.train import Fitting
from surgery.training import distributed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

OnStep = Callable[[int, dict[str, float]], None]


@dataclass
class Run:
    """Finished dictionaries."""

    dictionaries: dict[str, Dictionary]
    metrics: list[dict[str, float]]
    """One a step; of several dictionaries as `fvu/NAME`."""
    quality: dict[str, Measured] = field(default_factory=dict)
    """By dictionary, on held-out text; empty where nothing was held out."""
    out: Path | None = None

    def to_dataframe(self) -> pd.DataFrame:
        """One row a step."""
        import pandas as pd

        return pd.DataFrame(self.metrics)

    def plot(self) -> Figure:
        """The curves of the run."""
        from surgery.training.curves import curves

        return curves(self.metrics)


def train(
    recipe: Recipe | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    models: Any = None,
    tokenizer: Any = None,
    on_step: OnStep | None = None,
    **words: Any,
) -> Run:
    """Trains every dictionary of a recipe, or of its words, over one stream of activations.

    `models` (one or several, with their `tokenizer`) stand in for those that the recipe names. With `out`, that folder
    gets the dictionaries, the logs and the checkpoints that `resume` starts from, bit for bit; a KeyboardInterrupt that
    `on_step` raises (of several processes all of them) leaves a checkpoint of its step. Started as several processes
    (torchrun, accelerate) each reads some of the text and trains some of the dictionaries: the results are those of one
    process, bit for bit. Raises `SurgeryError` in a sentence for whatever is wrong, before a model is loaded where
    possible.
    """
    if recipe is None:
        recipe = make(words)
    check(recipe)
    out = out or recipe.output
    folder = None if out is None else Path(out)
    if folder is not None:
        check_folder(folder, resume)
    elif resume:
        raise SurgeryError("Resuming needs the folder of the run.", hint="Pass out=.")
    world = distributed.start("ddp" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "none")
    if models is None:
        models, tokenizer = opened(recipe.models, recipe.precision, world.device)
    models = list(models) if isinstance(models, list | tuple) else [models]
    source = Source(recipe, models, tokenizer, world)
    if recipe.evaluate.sequences:
        source.held_out()  # text too short for it is found out before the training, not behind it
    entries = source.entries()
    source.prepare()
    fitting = Fitting(entries, recipe.steps, world)
    kept = Checkpoints(folder, recipe, world)
    with kept:
        kept.begin(resume, fitting, source)
        metrics: list[dict[str, float]] = []
        clock = [time.perf_counter()]

        def note(step: int, lines: Mapping[str, dict[str, float]]) -> None:
            clock.append(time.perf_counter())
            took = clock.pop() - clock.pop()
            clock.append(time.perf_counter())
            metrics.append(
                {"step": step} | flat(lines) | {"seconds": took, "tokens_per_second": recipe.rows / max(took, 1e-9)}
            )
            kept.note(metrics[-1])
            try:
                if on_step:
                    on_step(step, {k: v for k, v in metrics[-1].items() if k != "step"})
            except KeyboardInterrupt:  # between two steps, where all is whole
                kept.save(fitting, source)
                raise
            every = recipe.checkpoint.every
            if every and (step % every == 0 or step == recipe.steps):  # what follows the last step can fail too
                kept.save(fitting, source)

        fitting.run(source.batches(), note)
        quality = source.measured(entries) if recipe.evaluate.sequences else {}
        dictionaries = {name: entry.dictionary for name, entry in entries.items()}
        if folder is not None and world.main:
            _written(folder, recipe, source, dictionaries, quality)
            metrics = kept.finished()
            _drawn(folder, recipe, metrics, quality)
    return Run(dictionaries, metrics, quality, folder)


def check_folder(out: Path, resume: bool) -> None:
    """Raises `SurgeryError` when a new run would write over another one, a finished one is to go on, or for a file."""
    if file := next((path for path in (out, *out.parents) if path.is_file()), None):
        raise SurgeryError(f"{file} is a file, and a run needs a folder.", hint="Choose another folder: --out DIR.")
    finished, begun = (out / "dictionaries").exists(), (out / "metrics.jsonl").exists()
    if resume and finished:
        raise SurgeryError(f"The run in {out} is finished.", hint="For a new one choose another folder.")
    if not resume and (begun or finished):
        raise SurgeryError(f"{out} holds a run already.", hint="Go on with it by --resume, or choose another folder.")


def flat(lines: Mapping[str, dict[str, float]]) -> dict[str, float]:
    """The lines of several dictionaries in one: `fvu` of a single one, else `fvu/NAME`."""
    apart = len(lines) > 1
    return {(f"{key}/{name}" if apart else key): value for name, line in lines.items() for key, value in line.items()
            if key not in ("step", "seconds")}  # fmt: skip


def _written(
    out: Path, recipe: Recipe, source: Source, dictionaries: dict[str, Dictionary], quality: dict[str, Measured]
) -> None:
    """The dictionaries, all of them or none; and what was measured. Raises `SurgeryError` when the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from surgery.checkpoint.disk import reason, renamed

    partial = out / f".dictionaries.{os.getpid()}"
    try:
        for name, dictionary in dictionaries.items():
            formats.save(dictionary, partial / name, metadata=source.metadata(name))
        if quality:
            save_file({name: each.quality.density for name, each in quality.items()}, out / "density.safetensors")
            numbers = {name: plain(each.to_dict()) for name, each in quality.items()}
            (out / "quality.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        renamed(partial, out / "dictionaries")
    except (OSError, SafetensorError, SurgeryError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        told = error.problem if isinstance(error, SurgeryError) else reason(error)
        last = max((path.name for path in out.glob("checkpoint-*")), key=lambda name: (len(name), name), default=None)
        raise SurgeryError(f"The dictionaries could not be written to {out} ({told.rstrip('.')}).",
                           hint=f"{last} is kept: make room and run again with --resume." if last else
                           "Make room and run again with --resume, which begins anew: with checkpoint.every set, most "
                           "of the work would be kept.",
                           ) from error  # fmt: skip


def _drawn(out: Path, recipe: Recipe, metrics: list[dict[str, float]], quality: dict[str, Measured]) -> None:
    from surgery.sae.figures import densities
    from surgery.training.curves import curves

    curves(metrics, title=recipe.name).savefig(out / "curves.png", dpi=110)
    if quality:
        densities({name: each.quality.density for name, each in quality.items()}).savefig(out / "density.png", dpi=110)
