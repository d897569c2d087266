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
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.anatomy import Site
from surgery.errors import SurgeryError
from surgery.sae import formats
from surgery.sae.activations import Rows, Shuffled, Stream
from surgery.sae.cache import Cached, identity, write
from surgery.sae.checkpoints import Checkpoints
from surgery.sae.dictionary import Dictionary
from surgery.sae.metrics import Quality, measure
from surgery.sae.recipe import Recipe, check, make, rule_of, settings_of
from surgery.sae.spliced import Loss, loss_recovered
from surgery.sae.text import Counted, Text, counted, text_rows
from surgery.sae.train import Entry, Fitting
from surgery.training import distributed
from surgery.training.plan import HELD_OUT

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

OnStep = Callable[[int, dict[str, float]], None]
ABLATIONS = ("zero", "mean")


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


@dataclass(frozen=True, eq=False)
class Measured:
    """A dictionary on held-out text: what it rebuilds, and what the model loses with it."""

    quality: Quality
    losses: dict[str, list[Loss]]
    """By ablation, one of each model that it stands in."""

    def to_dict(self) -> dict[str, Any]:
        """The numbers, without the density of each latent."""
        return self.quality.to_dict() | {
            f"with {ablation} ablation": [loss.to_dict() for loss in losses] for ablation, losses in self.losses.items()
        }


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
    `on_step` raises leaves a checkpoint of its step. Started as several processes (torchrun, accelerate) each reads
    some of the text and trains some of the dictionaries: the results are those of one process, bit for bit. Raises
    `SurgeryError` in a sentence for whatever is wrong, before a model is loaded where possible.
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
    entries = source.entries()
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
            if every and step % every == 0 and step < recipe.steps:
                kept.save(fitting, source)

        fitting.run(source.batches(), note)
        quality = {name: source.measured(entry) for name, entry in entries.items()} if recipe.evaluate.sequences else {}
        dictionaries = {name: entry.dictionary for name, entry in entries.items()}
        if folder is not None and world.main:
            _written(folder, recipe, source, dictionaries, quality)
            metrics = kept.finished()
            _drawn(folder, recipe, metrics, quality)
    return Run(dictionaries, metrics, quality, folder)


def check_folder(out: Path, resume: bool) -> None:
    """Raises `SurgeryError` when a new run would write over another one, or a finished one is to go on."""
    finished, begun = (out / "dictionaries").exists(), (out / "metrics.jsonl").exists()
    if resume and finished:
        raise SurgeryError(f"The run in {out} is finished.", hint="For a new one choose another folder.")
    if not resume and (begun or finished):
        raise SurgeryError(f"{out} holds a run already.", hint="Go on with it by --resume, or choose another folder.")


def opened(names: list[Any], precision: str = "float32", device: Any = "cpu") -> tuple[list[Any], Any]:
    """Models and their tokenizer. Raises `SurgeryError` where they do not read the same tokens."""
    from surgery.models import load, no_bars

    if None in names:
        raise SurgeryError("The recipe names no model.", hint="model: tiny-chain, or [base, tuned]")
    with no_bars():
        loaded = [load(str(name), precision, device) for name in names]
    tokenizers = [tokenizer for _, tokenizer in loaded]
    for name, other in zip(names[1:], tokenizers[1:], strict=True):
        if other.get_vocab() != tokenizers[0].get_vocab():
            raise SurgeryError(f"{name} has other tokens than {names[0]}, and both are to read the same.",
                               hint="Pairs need one tokenizer.")  # fmt: skip
    return [model for model, _ in loaded], tokenizers[0]


def flat(lines: Mapping[str, dict[str, float]]) -> dict[str, float]:
    """The lines of several dictionaries in one: `fvu` of a single one, else `fvu/NAME`."""
    apart = len(lines) > 1
    return {(f"{key}/{name}" if apart else key): value for name, line in lines.items() for key, value in line.items()
            if key not in ("step", "seconds")}  # fmt: skip


class Source:
    """The activations of a run: to train on, and held out."""

    def __init__(self, recipe: Recipe, models: list[Any], tokenizer: Any, world: distributed.World) -> None:
        self.recipe, self.models, self.tokenizer, self.world = recipe, models, tokenizer, world
        self.text = Text(text_rows(recipe.data, recipe.folder, recipe.seed), tokenizer, recipe.reading, recipe.seed)
        self.stream = self._stream(self.text)
        self.shuffled = Shuffled(self.stream, size=recipe.buffer, batch=recipe.rows, seed=recipe.seed)
        self.done = 0
        """Batches of a cache that are behind."""

    def _stream(self, batches: Iterable[Any], difference: bool | None = None) -> Stream:
        apart = self.recipe.difference if difference is None else difference
        return Stream(self.models, self.recipe.sites, batches, counted, self.tokenizer, apart, self.world)

    def entries(self) -> dict[str, Entry]:
        """Every dictionary as it begins; widths are those of the first batch of text."""
        first = next(iter(self.text))
        rows = self._stream([first]).read(first)
        if not len(next(iter(rows.values()))):
            raise SurgeryError(
                "No token of the first texts counts.", hint="Look at reading.positions and reading.skip."
            )
        device = next(iter(rows.values())).device
        found = {}
        for name, one in self.recipe.dictionaries.items():
            site, target = str(Site.parse(one.site)), None if one.target is None else str(Site.parse(one.target))
            many = 1 if self.recipe.difference else len(self.models)
            dictionary = Dictionary(
                rows[site].shape[1], one.latents, rule_of(one.rule), d_out=rows[target or site].shape[1], models=many,
                centered=target is None, skip=one.skip, seed=self.recipe.seed,
            )  # fmt: skip
            found[name] = Entry(site, dictionary.to(device), settings_of(self.recipe, one), target)
        return found

    def batches(self) -> Iterator[Rows]:
        """Rows to train on, from where the run is."""
        if self.recipe.cache is None:
            yield from self.shuffled
            return
        cached = self._cached(self.recipe.folder / self.recipe.cache)
        for rows in cached.batches(self.recipe.rows, seed=self.recipe.seed, begin=self.done):
            self.done += 1
            yield rows

    def _cached(self, folder: Path) -> Cached:
        if not folder.exists():
            if self.world.size > 1:
                raise SurgeryError(f"There is no cache {folder} yet, and several processes do not write one.",
                                   hint="Write it by a run of one process, with steps=1.")  # fmt: skip
            write(self._stream(UpTo(self.text, self.recipe.cache_rows)), folder, dtype=self.recipe.precision)
        cached = Cached(folder, models=self.models, tokenizer=self.tokenizer)
        for name in self.stream.names:
            if name not in cached.names:
                raise SurgeryError(f"The cache {folder} holds {', '.join(cached.names)}, and not '{name}'.",
                                   hint="Write another one: name another folder.")  # fmt: skip
        return cached

    def held_out(self) -> list[Counted]:
        """Text that is never trained on: of tasks without end, rows of another seed."""
        many, recipe = self.recipe.evaluate.sequences, self.recipe
        if self.text.rows.size != math.inf:
            return self.text.held_out(many)
        rows = text_rows(recipe.data, recipe.folder, recipe.seed + HELD_OUT)
        return Text(rows, self.tokenizer, recipe.reading, recipe.seed).held_out(many)

    def measured(self, entry: Entry) -> Measured:
        """One dictionary on held-out text; every process does all of it."""
        return measured(
            entry.dictionary, self.models, self.held_out(), entry.site, entry.target, difference=self.recipe.difference,
            loss=self.recipe.evaluate.loss, tokenizer=self.tokenizer,
        )  # fmt: skip

    def metadata(self, name: str) -> dict[str, Any]:
        """What a dictionary's file says of where it belongs."""
        one = self.recipe.dictionaries[name]
        about = {"site": one.site, "target": one.target, "models": [str(m) for m in self.recipe.models],
                 "difference": self.recipe.difference, "reading": self.recipe.reading.model_dump(mode="json"),
                 "steps": self.recipe.steps, "rows": self.recipe.rows, "seed": self.recipe.seed}  # fmt: skip
        return about | {"of": identity(self.models, self.tokenizer)}


def measured(
    dictionary: Dictionary,
    models: list[Any],
    batches: list[Any],
    site: str,
    target: str | None = None,
    *,
    difference: bool = False,
    loss: bool = True,
    tokenizer: Any = None,
    keep: Any = counted,
) -> Measured:
    """A dictionary on text: `measure`, and with `loss` what each model loses, by both ablations."""
    sites = list(dict.fromkeys([site, target or site]))
    rows = list(Stream(models, sites, batches, keep, tokenizer, difference))
    targets = None if target is None else [each[target] for each in rows]
    quality = measure(dictionary, [each[site] for each in rows], targets)
    losses = {}
    if loss:
        both = Stream(models, sites, batches, keep, tokenizer, difference)
        losses = {how: loss_recovered(both, dictionary, site, target, ablation=how) for how in ABLATIONS}
    return Measured(quality, losses)


@dataclass
class UpTo:
    """The batches of a text until so many tokens have counted."""

    text: Iterable[Counted]
    rows: int

    def __iter__(self) -> Iterator[Counted]:
        seen = 0
        for batch in self.text:
            yield batch
            seen += int(batch.counts.sum())
            if seen >= self.rows:
                return


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
        last = max((path.name for path in out.glob("checkpoint-*")), default=None)
        raise SurgeryError(f"The dictionaries could not be written to {out} ({told.rstrip('.')}).",
                           hint=f"{last} is kept: make room and run again with --resume." if last else
                           "Make room and train again; with checkpoint.every set, most of the work would be kept.",
                           ) from error  # fmt: skip


def _drawn(out: Path, recipe: Recipe, metrics: list[dict[str, float]], quality: dict[str, Measured]) -> None:
    from surgery.sae.figures import densities
    from surgery.training.curves import curves

    curves(metrics, title=recipe.name).savefig(out / "curves.png", dpi=110)
    if quality:
        densities({name: each.quality.density for name, each in quality.items()}).savefig(out / "density.png", dpi=110)


def plain(value: Any) -> Any:
    """As JSON: numbers that are none are null."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["Measured", "Run", "measured", "plain", "train"]
