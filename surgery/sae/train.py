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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.sae.activations import Rows
from surgery.sae.dictionary import Dictionary
from surgery.sae.rules import squared
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
    optimizers = {name: _begun(entry) for name, entry in entries.items()}
    stream = _scaled(entries, iter(batches))
    for step in range(steps):
        rows = next(stream, None)
        if rows is None:
            raise SurgeryError(
                f"The activations ended after {step} of {steps} steps.", hint="Read more text, or again."
            )
        lines = {name: _step(name, entry, optimizers[name], rows, step, steps) for name, entry in entries.items()}
        if on_step is not None:
            on_step(step + 1, lines)
    for entry in entries.values():
        entry.dictionary.fold(*entry.scale)
        entry.scale = (1.0, 1.0)
    return entries


def _begun(entry: Entry) -> torch.optim.Optimizer:
    entry.unused = torch.zeros(entry.dictionary.latents, dtype=torch.long, device=entry.dictionary.bias.device)
    settings = entry.settings
    return torch.optim.Adam(entry.dictionary.parameters(), lr=settings.lr, betas=settings.betas, fused=True)


def _scaled(entries: Mapping[str, Entry], batches: Iterator[Rows]) -> Iterator[Rows]:
    """The batches again, when the first of them have told the scale of every entry."""
    first = list(islice(batches, FIRST))
    for name, entry in entries.items():
        for site in {entry.site, entry.target or entry.site}:
            if first and site not in first[0]:
                raise SurgeryError(f"'{name}' reads '{site}', and the activations are of {', '.join(first[0])}.")
        if entry.settings.normalise and first:
            both = (entry.site, entry.target or entry.site)
            entry.scale = tuple(_factor(name, site, [rows[site] for rows in first]) for site in both)  # type: ignore[assignment]
    yield from first
    yield from batches


def _factor(name: str, site: str, rows: list[Tensor]) -> float:
    """sqrt(d) over the mean length of the rows."""
    length = float(torch.cat([r.norm(dim=1) for r in rows]).mean())
    if not length > 0:
        raise SurgeryError(f"The activations at '{site}' that '{name}' reads are all 0, or not finite.",
                           hint="Is it the site that you mean? normalise=False takes them as they are.")  # fmt: skip
    return math.sqrt(rows[0].shape[1]) / length


def _step(
    name: str, entry: Entry, optimizer: torch.optim.Optimizer, rows: Rows, step: int, steps: int
) -> dict[str, float]:
    """One step of one dictionary; its line of the log."""
    began, settings, dictionary = time.perf_counter(), entry.settings, entry.dictionary
    x, y = rows[entry.site] * entry.scale[0], rows[entry.target or entry.site] * entry.scale[1]
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
