"""A sweep over examples: batches and rows that fit the memory, whole forwards where nothing can be reused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from analysis.metrics import Metric
from analysis.patching.cells import KEPT, Cells, Column, Replacement, sweep
from analysis.results import Result
from surgery.activations.interventions import Captured, eager
from surgery.activations.passes import run
from surgery.activations.recording import record
from surgery.anatomy import Anatomy, Site, anatomy_of
from surgery.anatomy.sites import UNLAYERED
from surgery.errors import SurgeryError
from surgery.models import Batch, untouched

Progress = Callable[[int, int], None]
"""Called with (cells done, cells in all)."""
Source = Replacement
By = Literal["position", "all"]
BUDGET = 1 << 30
"""Bytes that a sweep may take beside the model."""


@dataclass(frozen=True)
class Place:
    """A label of the position axis, and the columns it stands for: from `start` on, or one of each row."""

    label: Any
    start: int
    columns: Tensor | None = None
    idle: Tensor | None = None
    """(batch,) rows in which a change here is known to do nothing."""

    def of(self, rows: slice) -> Column:
        """The same for some of the examples."""
        return Column(self.start, None if self.columns is None else self.columns[rows])


def chosen_by(by: By | None, positions: Any, default: By) -> By:
    """What a cell is: one position, or all of them."""
    if by not in (None, "position", "all"):
        raise SurgeryError(f"by={by!r}: expected 'position' or 'all'.")
    if by == "all" and positions is not None:
        raise SurgeryError("positions= choose single positions, and by='all' takes them together.",
                           hint="Leave one of them out.")  # fmt: skip
    return by or ("position" if positions is not None else default)


def everywhere(first: int | Tensor, width: int | None = None) -> list[Place]:
    """All positions at once; nothing happens before `first`, a column of all rows or (batch,) one of each."""
    if isinstance(first, int):
        return [Place(None, first)]
    return [Place(None, int(first.min()), None, None if width is None else first >= width)]


def places_of(batch: Batch, positions: Sequence[int] | int | None, first: int | Tensor) -> list[Place]:
    """One place a position, all of them by default; those before `first` are known to have no effect."""
    longest, shortest = int(batch.lengths.max()), int(batch.lengths.min())
    wanted = listed(positions, "positions") or list(range(longest))
    found = []
    for position in wanted:
        if not -shortest <= position < longest:
            raise SurgeryError(f"There is no position {position}: the prompts have {shortest} to {longest} tokens.")
        column = batch.lengths + position if position < 0 else torch.full_like(batch.lengths, position)
        idle = (column < first) | (column >= batch.lengths)
        start = batch.ids.shape[1] if bool(idle.all()) else int(column.min())
        found.append(Place(position, start, column, idle))
    return found


def listed(numbers: Sequence[int] | int | None, what: str) -> list[int] | None:
    """Some layers, positions or parts as a list; one number is a list of one."""
    if numbers is None:
        return None
    found = [numbers] if isinstance(numbers, int) else list(numbers)
    if not found or not all(isinstance(n, int) or hasattr(n, "__index__") for n in found):
        raise SurgeryError(f"{what}={numbers!r}: whole numbers are expected, one at least.",
                           hint=f"Leave {what}= out for all of them.")  # fmt: skip
    return [int(n) for n in found]


@dataclass
class Run:
    """One site of one model over a batch of prompts."""

    model: Any
    base: Batch
    metric: Metric
    site: str
    layers: Sequence[int] | None
    parts: Sequence[int] | None
    budget: int
    reuse: bool
    anatomy: Anatomy = field(init=False)

    def __post_init__(self) -> None:
        self.anatomy = anatomy_of(self.model)
        site = Site.parse(self.site)
        if site.layer is not None or site.head is not None or site.position is not None:
            raise SurgeryError(f"A sweep goes over all of '{site.name}', and '{self.site}' names a part of it.",
                               hint=f"site='{site.name}', with layers=, positions= or parts=.")  # fmt: skip
        if site.name in UNLAYERED:
            raise SurgeryError(f"'{site.name}' is in no layer: a sweep goes over the layers of a site.",
                               hint="'resid_pre' of layer 0 is what the embedding gives.")  # fmt: skip
        self.anatomy.expand([site])
        self.site = site.name
        self.layers = list(range(self.anatomy.n_layers) if self.layers is None else self.layers)
        self.anatomy.expand([site.at(layer) for layer in self.layers])
        count = self.anatomy.heads_of(self.site)
        if count is None and self.parts is not None:
            raise SurgeryError(f"'{self.site}' has no heads: parts= can't choose among them.")
        if count is not None:
            self.parts = list(range(count) if self.parts is None else self.parts)
            self.anatomy.expand([Site(self.site, 0, part) for part in self.parts])
        self.metric = self.metric.to(self.model.device)
        self.metric.check(len(self.base), self.anatomy.embed.weight.shape[0])
        apart = self.anatomy.heads_apart or self.site not in ("q", "k", "v", "pattern")
        self.reuse = self.reuse and self.site in KEPT and apart and not _hooked(self.anatomy)

    def __call__(
        self, places: Sequence[Place], values: Callable[[slice], Source], progress: Progress | None
    ) -> tuple[Tensor, Tensor]:
        """Effects (example, layer, place, part) and the metric (example,) of the unchanged run."""
        active = [i for i, place in enumerate(places) if place.start < self.base.ids.shape[1]]
        total = len(self.base) * len(self.layers or ()) * len(active) * len(self.parts or (0,))
        done, found, before = 0, [], []

        def advance(cells: int) -> None:
            nonlocal done
            done += cells
            if progress is not None:
                progress(min(done, total), total)

        size, rows = self._sizes()
        with ExitStack() as stack:
            stack.enter_context(untouched(self.model))
            stack.enter_context(eager(self.model) if self.site in ("pattern", "scores") else nullcontext())
            for begin in range(0, len(self.base), size):
                part = slice(begin, begin + size)
                metric, batch = self.metric.select(part), self.base.select(part)
                columns = [places[i].of(part) for i in active]
                one, unchanged = self._batch(batch, metric, columns, values(part), rows, advance)
                whole = one.new_zeros(len(batch), len(self.layers or ()), len(places), one.shape[-1])
                whole[:, :, active] = one - unchanged[:, None, None, None]
                for i in active:
                    if (idle := places[i].idle) is not None:
                        whole[idle[part], :, i] = 0  # not a rounding of it
                found.append(whole)
                before.append(unchanged)
        return torch.cat(found), torch.cat(before)

    def _batch(
        self, batch: Batch, metric: Metric, columns: list[Column], source: Source, rows: int, advance: Any
    ) -> tuple[Tensor, Tensor]:
        """The metric of every cell, and of the unchanged run."""
        if not self.reuse:
            return self._whole_forwards(batch, metric, columns, source, advance)
        recording = record(self.model, batch, KEPT[self.site])
        last = recording.logits() if metric.needs == "all" else None
        if last is None:
            assert recording.final is not None
            final = recording.final[torch.arange(len(batch), device=batch.last.device), batch.last]
            unchanged = metric.of_final(final[None], self.anatomy)[0]
        else:
            unchanged = metric.value(last)
        if not columns:
            return unchanged.new_zeros(len(batch), len(self.layers or ()), 0, len(self.parts or (0,))), unchanged
        cells = Cells(recording, self.site, source)
        step = len(batch)
        found = sweep(cells, metric, list(self.layers or ()), columns, self.parts, unchanged=unchanged,
                      rows=rows, advance=lambda groups: advance(groups * step))  # fmt: skip
        return found, unchanged

    def _whole_forwards(
        self, batch: Batch, metric: Metric, columns: list[Column], source: Source, advance: Any
    ) -> tuple[Tensor, Tensor]:
        """One whole forward a cell: what the fast form is held against, and for sites that it does not know."""
        logits, _ = run(self.model, batch)
        assert logits is not None
        pattern = Site(self.site).kind == "pattern"
        parts: Sequence[int | None] = [None] if self.parts is None else self.parts
        found = torch.zeros(len(batch), len(self.layers or ()), len(columns), len(parts), device=logits.device)
        for i, layer in enumerate(self.layers or ()):
            new = source(layer)
            for j, column in enumerate(columns):
                for k, part in enumerate(parts):

                    def change(old: Tensor, new: Tensor = new, column: Column = column, part: Any = part) -> Tensor:
                        everywhere = Column(0, column.columns).kept(old, new, 2 if pattern else 1)
                        if part is None:
                            return everywhere
                        old = old.clone()
                        index = (slice(None), part) if pattern else (slice(None), slice(None), part)
                        old[index] = everywhere[index]
                        return old

                    patched, _ = run(self.model, batch, edits={Site(self.site, layer): change})
                    assert patched is not None
                    found[:, i, j, k] = metric.of_logits(patched, batch.last)
                    advance(len(batch))
        return found, metric.of_logits(logits, batch.last)

    def whole(self, batch: Batch) -> Tensor:
        """The metric (example,) of plain runs of another batch."""
        size, _ = self._sizes()
        return torch.cat([self.seen(batch, slice(i, i + size))[0] for i in range(0, len(batch), size)])

    def seen(self, batch: Batch, rows: slice, sites: Sequence[str | Site] = ()) -> tuple[Tensor, Captured]:
        """The metric (example,) of a plain run of some examples of another batch, and what is at some sites."""
        part, metric = batch.select(rows), self.metric.select(rows)
        if metric.needs == "all":
            logits, seen = run(self.model, part, sites)
            assert logits is not None
            return metric.of_logits(logits, part.last), seen
        _, seen = run(self.model, part, [*sites, "final@-1"], stop=True)
        with torch.no_grad():
            return metric.of_final(seen["final@-1"][None], self.anatomy)[0], seen

    def _sizes(self) -> tuple[int, int]:
        """Examples recorded at a time, and rows run at a time, that keep within the budget (one of each at least)."""
        anatomy, width = self.anatomy, self.base.ids.shape[1]
        number = next(self.model.parameters()).element_size()
        heads = anatomy.n_heads * anatomy.d_head
        mlp = 4 * anatomy.d_model if anatomy.family.down is None else anatomy.d_mlp()
        of_site = {"stream": anatomy.d_model, "heads": heads, "neurons": mlp}.get(
            Site(self.site).kind, anatomy.n_heads * width
        )
        kept = anatomy.n_layers * (2 * anatomy.d_model + 2 * anatomy.n_kv_heads * anatomy.d_head + 2 * of_site)
        row = 6 * anatomy.d_model + 2 * mlp + 3 * heads
        if self.metric.needs == "all":
            kept, row = kept + anatomy.head.weight.shape[0], row + 2 * anatomy.head.weight.shape[0]
        size = max(1, min(len(self.base), int(self.budget / 2 / (kept * width * number))))
        if not self.metric.divisible:
            size = len(self.base)  # a plain function may know the examples by their rows: they stay together
        return size, max(1, int((self.budget - size * kept * width * number) / (row * width * number)))

    def result(
        self, effects: Tensor, places: Sequence[Place], columns: dict[str, Tensor], meta: dict[str, Any], tokenizer: Any
    ) -> Result:
        """Effects with their labels; an axis of one place or part that nobody asked for is left out."""
        axes: dict[str, Any] = {"example": list(range(len(self.base))), "layer": list(self.layers or ())}
        values = effects.double().cpu().numpy()
        meta = {**meta, "site": self.site, "metric": self.metric.name, "centre": 0}
        if places[0].label is None:
            values = values[:, :, 0]
        else:
            axes["position"] = [place.label for place in places]
            if tokenizer is not None:
                meta["ticks"] = {"position": tokens_at(self.base, places, tokenizer)}
        if self.parts is None:
            values = values[..., 0]
        else:
            kind = Site(self.site).kind
            axes["neuron" if kind == "neurons" else "kv_head" if self.site in ("k", "v") else "head"] = self.parts
        numbers = {name: np.asarray(column.double().cpu()).tolist() for name, column in columns.items()}
        return Result(values, axes, f"effect on {self.metric.name}", numbers, meta)


def _hooked(anatomy: Anatomy) -> bool:
    """Whether hooks of others (an `edit` that is open) are in the blocks: to take up a pass would call some twice."""
    modules = [module for block in anatomy.blocks for module in block.modules()]
    hooks = [h for m in modules for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    return any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)


def tokens_at(batch: Batch, places: Sequence[Place], tokenizer: Any) -> list[str]:
    """What stands at each place: the token where all prompts agree, else its label."""
    texts = batch.tokens(tokenizer)
    found = []
    for place in places:
        assert place.columns is not None
        here = {row[c] for row, c in zip(texts, place.columns.tolist(), strict=True) if c < len(row)}
        found.append(f"{place.label} {here.pop()!r}" if len(here) == 1 else str(place.label))
    return found
