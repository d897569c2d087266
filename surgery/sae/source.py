"""The activations of a run: which models are read, on which text, to train on and held out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from surgery.anatomy import Site
from surgery.errors import SurgeryError
from surgery.sae.activations import Rows, Shuffled, Stream
from surgery.sae.cache import Cached, identity, write
from surgery.sae.dictionary import Dictionary
from surgery.sae.evaluation import Measured, measured
from surgery.sae.recipe import Recipe, rule_of, settings_of
from surgery.sae.text import Counted, Text, counted, text_rows
from surgery.sae.train import Entry
from surgery.training import distributed
from surgery.training.data import kept_out, trained_on
from surgery.training.plan import HELD_OUT
from surgery.training.recipe import as_words


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


class Source:
    """The activations of a run: to train on, and held out."""

    def __init__(self, recipe: Recipe, models: list[Any], tokenizer: Any, world: distributed.World) -> None:
        self.recipe, self.models, self.tokenizer, self.world = recipe, models, tokenizer, world
        rows = trained_on(text_rows(recipe.data, recipe.folder, recipe.seed), recipe.reading.held_out)
        self.text = Text(rows, tokenizer, recipe.reading, recipe.seed)
        self.stream = self._stream(self.text)
        self.shuffled = Shuffled(self.stream, size=recipe.buffer, batch=recipe.rows, seed=recipe.seed)
        self.done = 0
        """Batches of a cache that are behind."""
        self.cached: Cached | None = None
        self._held: list[Counted] | None = None

    def _stream(self, batches: Iterable[Any]) -> Stream:
        return Stream(self.models, self.recipe.sites, batches, counted, self.tokenizer, self.recipe.difference,
                      self.recipe.reading.longest, self.world)  # fmt: skip

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

    def prepare(self) -> None:
        """Opens the cache, written where it is not there: what is wrong with it is told before a run has a folder."""
        if self.recipe.cache is not None:
            self.cached = self._cached(self.recipe.cache.expanduser())

    def batches(self) -> Iterator[Rows]:
        """Rows to train on, from where the run is."""
        if self.cached is None:
            yield from self.shuffled
            return
        size, names = self.recipe.rows, self.stream.names
        for rows in self.cached.batches(size, seed=self.recipe.seed, begin=self.done, sites=names):
            self.done += 1
            yield rows

    def _cached(self, folder: Path) -> Cached:
        if not folder.exists():
            if self.world.size > 1:
                raise SurgeryError(f"There is no cache {folder} yet, and several processes do not write one.",
                                   hint="Write it by a run of one process, with steps=1.")  # fmt: skip
            up_to = UpTo(self.text, self.recipe.cache_rows)
            write(self._stream(up_to), folder, dtype=self.recipe.precision, note=self._note())
        cached = Cached(folder, models=self.models, tokenizer=self.tokenizer)
        for key, value in self._note().items():
            if cached.note is not None and cached.note.get(key) != value:
                raise SurgeryError(f"The cache {folder} was written with another `{key}`.",
                                   hint="Name another folder for it, or take that one away.")  # fmt: skip
        for name in self.stream.names:
            if name not in cached.names:
                raise SurgeryError(f"The cache {folder} holds {', '.join(cached.names)}, and not '{name}'.",
                                   hint="Write another one: name another folder.")  # fmt: skip
        return cached

    def _note(self) -> dict[str, Any]:
        """What of the recipe a cache is made by."""
        words = as_words(self.recipe)
        return {key: words[key] for key in ("data", "reading", "cache_rows", "difference", "precision", "seed")}

    def held_out(self) -> list[Counted]:
        """Text that is never trained on: of tasks, which have no end, rows of another seed."""
        if self._held is None:
            recipe, text = self.recipe, self.text
            if text.rows.size == math.inf:
                mine, others = (text_rows(recipe.data, recipe.folder, recipe.seed + more) for more in (0, HELD_OUT))
                rows = kept_out(mine, others, recipe.reading.held_out)
                text = Text(rows, self.tokenizer, recipe.reading, recipe.seed)
            self._held = text.held_out(recipe.evaluate.sequences)
        return self._held

    def measured(self, entries: Mapping[str, Entry]) -> dict[str, Measured]:
        """Dictionaries on held-out text, those of one place together; every process does all of it."""
        places: dict[tuple[str, str | None], dict[str, Dictionary]] = {}
        for name, entry in entries.items():
            places.setdefault((entry.site, entry.target), {})[name] = entry.dictionary
        found: dict[str, Measured] = {}
        for place, dictionaries in places.items():
            found |= measured(
                dictionaries, self.models, self.held_out(), *place, difference=self.recipe.difference,
                loss=self.recipe.evaluate.loss, tokenizer=self.tokenizer, longest=self.recipe.reading.longest,
            )  # fmt: skip
        return {name: found[name] for name in entries}

    def metadata(self, name: str) -> dict[str, Any]:
        """What a dictionary's file says of where it belongs."""
        one = self.recipe.dictionaries[name]
        about = {"site": one.site, "target": one.target, "models": [str(m) for m in self.recipe.models],
                 "difference": self.recipe.difference, "reading": self.recipe.reading.model_dump(mode="json"),
                 "steps": self.recipe.steps, "rows": self.recipe.rows, "seed": self.recipe.seed}  # fmt: skip
        return about | {"of": self._identity}

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """Whose activations they are: a checksum of all weights."""
        return identity(self.models, self.tokenizer)


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
