"""Training dictionaries: several of them, at any sites, over one stream of activations.

    found = fit({"k 32": Entry("resid_post.2", Dictionary(96, 1024, BatchTopK(k=32)))}, batches, steps=2000)
    found["k 32"].dictionary, found["k 32"].log

A step of each dictionary: the squared error and the terms of its rule, gradients clipped, Adam; latents that no row has
used for `dead_after` rows are dead until one does. Activations are brought to a mean length of sqrt(d) by one factor,
estimated on the first rows and folded into the weights at the end: the dictionary then reads activations as they are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.sae.activations import Rows
from surgery.sae.dictionary import Dictionary
from surgery.sae.rules import squared
from surgery.training.distributed import World
from surgery.training.schedules import learning_rate

FIRST = 16
"""Batches that the length of activations is estimated on; they are trained on like the others."""


@dataclass(frozen=True)
class Settings:
    """Of one dictionary's training; `warmup` and `shape` as in `surgery.training.schedules`."""

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    warmup: float = 0.0
    shape: str = "constant"
    final: float = 0.0
    dead_after: int = 10_000_000
    normalise: bool = True
    """Whether activations are brought to a mean length of sqrt(d)."""


@dataclass
class Entry:
    """One dictionary in training: where it reads (and, of a transcoder, what it rebuilds), and how it learns."""

    site: str
    dictionary: Dictionary
    settings: Settings = Settings()
    target: str | None = None
    log: list[dict[str, float]] = field(default_factory=list, repr=False)
    """One line a step."""
    unused: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long), repr=False)
    """(latents,) rows since each was used."""
    scale: tuple[float, float] = (1.0, 1.0)
    """What activations, and targets, are multiplied by in training; 1 once it is folded."""


OnStep = Callable[[int, Mapping[str, dict[str, float]]], None]


def fit(
    entries: Mapping[str, Entry], batches: Iterable[Rows], *, steps: int, on_step: OnStep | None = None
) -> Mapping[str, Entry]:
    """Trains every entry on `steps` batches of rows by site (`Shuffled` gives them); the same entries back.

    Raises `SurgeryError` for batches that are fewer, without a site, of another width, all 0, or not finite, and for a
    loss that is not finite.
    """
    Fitting(entries, steps).run(batches, on_step)
    return entries


class Fitting:
    """Training of several dictionaries, which can be kept between two steps and taken up again bit for bit.

    Of many processes each trains some of the dictionaries, on the same batches: the results are those of one process.
    """

    def __init__(self, entries: Mapping[str, Entry], steps: int, world: World | None = None) -> None:
        self.entries, self.steps, self.world = entries, steps, world or World()
        self.step = 0
        self.ahead: list[Rows] = []
        """Batches that the scale was estimated on and that are not trained on yet."""
        self.optimizers = {name: _begun(entry) for name, entry in entries.items()}
        names = list(entries)
        self.mine = [names[i] for i in range(self.world.rank, len(names), self.world.size)]

    def run(self, batches: Iterable[Rows], on_step: OnStep | None = None) -> None:
        """The steps that are left, on `batches` from there on; then scales are folded."""
        stream = iter(batches)
        if not self.step:
            self.ahead = list(islice(stream, FIRST))
            if self.ahead:
                _scale(self.entries, self.ahead)
        while self.step < self.steps:
            rows = self.ahead.pop(0) if self.ahead else next(stream, None)
            if rows is None:
                raise SurgeryError(f"The activations ended after {self.step} of {self.steps} steps.",
                                   hint="Read more text, or again.")  # fmt: skip
            lines = self._all(rows)
            self.step += 1
            if on_step is not None:
                on_step(self.step, lines)
        self.gather()
        for entry in self.entries.values():
            entry.dictionary.fold(*entry.scale)
            entry.scale = (1.0, 1.0)

    def _all(self, rows: Rows) -> dict[str, dict[str, float]]:
        """One step of every dictionary."""

        def work() -> dict[str, dict[str, float]]:
            found = {}
            for name in self.mine:
                entry = self.entries[name]
                found[name] = _step(name, entry, self.optimizers[name], rows, self.step, self.steps)
                if self.step + 1 == self.steps:
                    entry.dictionary.rule.finish(entry.dictionary, _rows(entry, rows)[0])
            return found

        found = {name: line for part in self.world.together(work) for name, line in part.items()}
        return {name: found[name] for name in self.entries}

    def gather(self) -> None:
        """Brings every dictionary, as it now is, to every process."""
        if self.world.size == 1:
            return
        for part in self.world.gather({name: self._state(name) for name in self.mine}):
            for name, tensors in part.items():
                self._restore(name, tensors)

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """By dictionary its tensors (weights, moments, use), under "ahead" the batches; and the plain numbers."""
        self.gather()
        tensors = {name: self._state(name) for name in self.entries}
        tensors[AHEAD] = {f"{i}.{site}": rows for i, each in enumerate(self.ahead) for site, rows in each.items()}
        scales = {name: list(entry.scale) for name, entry in self.entries.items()}
        return tensors, {"step": self.step, "ahead": len(self.ahead), "scales": scales}

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], numbers: Mapping[str, Any]) -> None:
        """Takes up a state of the same entries. Raises `SurgeryError` where shapes are others."""
        for name, entry in self.entries.items():
            self._restore(name, tensors[name])
            entry.scale = tuple(numbers["scales"][name])
        self.step = numbers["step"]
        self.ahead = [{} for _ in range(numbers["ahead"])]
        for key, value in tensors.get(AHEAD, {}).items():
            which, _, site = key.partition(".")
            self.ahead[int(which)][site] = value

    def _state(self, name: str) -> dict[str, Tensor]:
        entry, optimizer = self.entries[name], self.optimizers[name]
        found = {f"weights.{key}": value for key, value in entry.dictionary.state_dict().items()}
        for key, parameter in entry.dictionary.named_parameters():
            for moment, value in optimizer.state.get(parameter, {}).items():
                found[f"{moment}.{key}"] = value
        return {key: value.detach().cpu().clone() for key, value in (found | {"unused": entry.unused}).items()}

    def _restore(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        entry, optimizer = self.entries[name], self.optimizers[name]
        weights = {key.removeprefix("weights."): v for key, v in tensors.items() if key.startswith("weights.")}
        there = entry.dictionary.state_dict()
        if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in there.items()}:
            raise SurgeryError(f"What was kept of '{name}' is of a dictionary of another shape.",
                               hint="Begin again in another folder.")  # fmt: skip
        entry.dictionary.load_state_dict(weights)
        entry.unused = tensors["unused"].to(entry.unused.device)
        for key, parameter in entry.dictionary.named_parameters():
            moments = {m: v for m, _, k in (t.partition(".") for t in tensors) if k == key and m != "weights"
                       for v in [tensors[f"{m}.{key}"]]}  # fmt: skip
            if moments:
                optimizer.state[parameter] = {m: v.to(parameter.device).clone() for m, v in moments.items()}


AHEAD = "ahead"


def _scale(entries: Mapping[str, Entry], first: list[Rows]) -> None:
    """Tells the scale of every entry by the first batches."""
    for name, entry in entries.items():
        both = (entry.site, entry.target or entry.site)
        for site in both:
            if site not in first[0]:
                raise SurgeryError(f"'{name}' reads '{site}', and the activations are of {', '.join(first[0])}.")
            if all(bool((rows[site] == first[0][site][0]).all()) for rows in first) and bool(first[0][site].any()):
                raise SurgeryError(f"The activations at '{site}' that '{name}' reads are the same in every row.",
                                   hint="Is it the site that you mean, and do the texts differ?")  # fmt: skip
        if entry.settings.normalise:
            if both[0] != both[1] and entry.dictionary.is_centered:
                raise SurgeryError(f"'{name}' rebuilds '{both[1]}', and is centred by its bias as if it read that too.",
                                   hint="Dictionary(..., centered=False)")  # fmt: skip
            entry.scale = tuple(_factor(name, site, [rows[site] for rows in first]) for site in both)  # type: ignore[assignment]


def _begun(entry: Entry) -> torch.optim.Optimizer:
    entry.unused = torch.zeros(entry.dictionary.latents, dtype=torch.long, device=entry.dictionary.bias.device)
    settings = entry.settings
    return torch.optim.Adam(entry.dictionary.parameters(), lr=settings.lr, betas=settings.betas, fused=True)


def _factor(name: str, site: str, rows: list[Tensor]) -> float:
    """sqrt(d) over the mean length of the rows."""
    length = float(torch.cat([r.norm(dim=1) for r in rows]).mean())
    if not length > 0:
        raise SurgeryError(f"The activations at '{site}' that '{name}' reads are all 0, or not finite.",
                           hint="Is it the site that you mean? normalise=False takes them as they are.")  # fmt: skip
    return math.sqrt(rows[0].shape[1]) / length


def _rows(entry: Entry, rows: Rows) -> tuple[Tensor, Tensor]:
    """What a dictionary reads and rebuilds, scaled, and where it is: a cache and checkpoints have rows elsewhere."""
    x, y = (rows[site].to(entry.dictionary.bias) for site in (entry.site, entry.target or entry.site))
    return x * entry.scale[0], y * entry.scale[1]


def _step(
    name: str, entry: Entry, optimizer: torch.optim.Optimizer, rows: Rows, step: int, steps: int
) -> dict[str, float]:
    """One step of one dictionary; its line of the log."""
    began, settings, dictionary = time.perf_counter(), entry.settings, entry.dictionary
    x, y = _rows(entry, rows)
    dead = entry.unused >= settings.dead_after
    found = dictionary.trained(x, y, dead=dead if bool(dead.any()) else None,
                               warm=min(1.0, (step + 1) / max(1, dictionary.rule.warmup)))  # fmt: skip
    error = squared(found.output - y)
    loss = error + sum(found.terms.values())
    if not bool(loss.isfinite()):
        bad = (~x.isfinite()).any(1).nonzero()
        where = f"row {int(bad[0])} of the batch is not finite" if len(bad) else "its rows are finite"
        raise SurgeryError(f"Step {step + 1} of '{name}': the loss is not finite ({where}).",
                           hint="Lower its learning rate, or look at the activations.")  # fmt: skip
    loss.backward()
    norm = nn.utils.clip_grad_norm_(dictionary.parameters(), settings.clip or math.inf)
    factor = learning_rate(step, steps, shape=settings.shape, warmup=settings.warmup, final=settings.final)
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * factor
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    dictionary.rule.settle(dictionary)
    entry.unused = torch.where(found.fired > 0, 0, entry.unused + len(x))
    with torch.no_grad():
        spread = float((y - y.mean(0)).square().sum(-1).mean())
    line = {"step": step + 1, "loss": float(loss.detach()), "mse": float(error.detach()),
            "fvu": float(error.detach()) / max(spread, 1e-30), "l0": float(found.fired.sum()) / len(x),
            "dead": float(dead.double().mean()), "grad_norm": float(norm), "lr": settings.lr * factor,
            "seconds": time.perf_counter() - began}  # fmt: skip
    entry.log.append(line | {what: float(term.detach()) for what, term in found.terms.items()})
    return entry.log[-1]
