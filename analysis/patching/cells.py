"""The cells of a sweep: what each change makes of a recorded pass, and the metric behind it; nothing is computed twice.

A cell is one change at one layer (and position, head or neuron). What it makes of the stream is an `Entry` of
`surgery.activations.resume`; the entries of one column run through the blocks above them together, as many rows at a
time as the memory allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from analysis.metrics import Metric
from surgery.activations.recording import Recording
from surgery.activations.resume import Entry, attended, finish, written_by_heads, written_by_neurons

KEPT = {
    "resid_pre": (), "resid_post": (), "resid_mid": ("resid_mid",), "attn_out": ("attn_out",), "mlp_out": ("mlp_out",),
    "z": ("z",), "q": ("z", "q"), "k": ("z", "k"), "v": ("z", "v"), "pattern": ("z",), "mlp_post": ("mlp_post",),
}  # fmt: skip
"""Sites whose changes can be taken up from where they are, with what a recording must keep for it."""

CALL = 5_000_000
"""Multiply-adds in the time that calling a block takes."""

Replacement = Callable[[int], Tensor]
"""What takes the place of a site's values in a layer: (batch, pos, ...) with the recorded columns, or one column."""


@dataclass(frozen=True)
class Column:
    """Where values are replaced: at one column of each row, or at all columns from `start` on."""

    start: int
    columns: Tensor | None = None
    """(batch,) the column of each row; None: all."""

    def kept(self, old: Tensor, new: Tensor, dim: int = 1) -> Tensor:
        """`new` where values are replaced, `old` elsewhere; both begin at `start`, with positions along `dim`."""
        new = new.to(old.dtype).expand(old.shape)
        if self.columns is None:
            return new
        here = torch.arange(old.shape[dim], device=old.device) + self.start == self.columns[:, None]
        shape = [1] * old.dim()
        shape[0], shape[dim] = len(here), old.shape[dim]
        return torch.where(here.view(shape), new, old)


@dataclass
class Cells:
    """The changes of one site in one recorded pass."""

    recording: Recording
    site: str
    replacement: Replacement
    _attended: dict[int, tuple[int, Tensor]] = field(default_factory=dict)

    def changes(self, layer: int, column: Column) -> bool:
        """Whether what is written in differs from what was there: before block 0, only where the tokens differ."""
        if self.site == "pattern":  # which no recording keeps
            return True
        if self.site in ("resid_pre", "resid_post"):
            old = self.recording.stream[layer + (self.site == "resid_post")]
        else:
            old = self.recording.seen[f"{self.site}.{layer}"]
        new = self.replacement(layer).to(old.dtype).expand(old.shape)
        if column.columns is None:
            return not torch.equal(old[:, column.start :], new[:, column.start :])
        rows = torch.arange(len(old), device=old.device)
        return not torch.equal(old[rows, column.columns], new[rows, column.columns])

    def entry(self, layer: int, column: Column, parts: Sequence[int] | None) -> Entry:
        """What the cells of one layer and column begin with: one group, or one for each of the heads or neurons."""
        site, start, recording = self.site, column.start, self.recording
        if site in ("resid_pre", "resid_post"):
            at = layer + (site == "resid_post")
            return Entry(at, column.kept(recording.stream[at][:, start:], _cut(self.replacement(layer), start)))
        if parts is None:
            old = recording.seen[f"{site}.{layer}"][:, start:]
            return self._written(layer, (column.kept(old, _cut(self.replacement(layer), start)) - old)[None], start)
        if site == "mlp_post":
            old = recording.seen[f"mlp_post.{layer}"][:, start:]
            difference = column.kept(old, _cut(self.replacement(layer), start)) - old
            made = written_by_neurons(recording.anatomy, layer, difference, parts)
        else:
            old = recording.seen[f"z.{layer}"][:, start:]
            if site in ("q", "k") and recording.anatomy.norms_over_heads(layer):
                return self._written(layer, self._normed(layer, old, self._together(layer, column, old, parts)), start)
            difference = self._z(layer, column, old) - old
            if site in ("k", "v"):  # a key-value head is all of its query heads
                difference = difference.unflatten(2, (recording.anatomy.n_kv_heads, -1)).flatten(3)
            made = written_by_heads(recording.anatomy, layer, difference, parts)
        return self._written(layer, self._normed(layer, old, made), start)

    def _z(self, layer: int, column: Column, old: Tensor) -> Tensor:
        """z from `column.start` on, as if each head's own value were replaced."""
        site, start = self.site, column.start
        if site == "z":
            return column.kept(old, _cut(self.replacement(layer), start))
        if site in ("k", "v"):  # seen by all later tokens, so that every column needs attention anew
            before = self.recording.seen[f"{site}.{layer}"][:, start:]
            value = column.kept(before, _cut(self.replacement(layer), start))
            return attended(self.recording, layer, site, value, start)
        if layer not in self._attended or self._attended[layer][0] > start:
            new = self.replacement(layer)
            value = _cut(new, start, 2 if site == "pattern" else 1)
            self._attended[layer] = start, attended(self.recording, layer, site, value, start)
        begun, z = self._attended[layer]
        return column.kept(old, z[:, start - begun :])  # a query, or a row of the pattern, is one token's own

    def _together(self, layer: int, column: Column, old: Tensor, parts: Sequence[int]) -> Tensor:
        """Where a norm goes over all heads at once, a change of one is seen by all: each needs attention anew."""
        site, start, made = self.site, column.start, []
        before = self.recording.seen[f"{site}.{layer}"][:, start:]
        new = column.kept(before, _cut(self.replacement(layer), start))
        for part in parts:
            value = before.clone()
            value[:, :, part] = new[:, :, part]
            difference = attended(self.recording, layer, site, value, start) - old
            made.append(written_by_heads(self.recording.anatomy, layer, difference.flatten(2)[:, :, None], [0]))
        return torch.cat(made)

    def _normed(self, layer: int, old: Tensor, made: Tensor) -> Tensor:
        """What reaches the stream where a norm stands between: it sees all heads, or all neurons, together."""
        anatomy, mlp = self.recording.anatomy, self.site == "mlp_post"
        norm = anatomy.norm("mlp_out_norm" if mlp else "attention_norm", layer)
        if norm is None:
            return made
        before = anatomy.down(layer)(old) if mlp else anatomy.out(layer)(old.flatten(2))
        return norm(before + made) - norm(before)

    def _written(self, layer: int, made: Tensor, start: int) -> Entry:
        """The entry of differences (groups, batch, pos, d_model) in what attention or MLP add to the stream."""
        recording = self.recording
        if self.site in ("mlp_out", "mlp_post") or recording.anatomy.parallel:
            return Entry(layer + 1, (recording.stream[layer + 1][:, start:] + made).flatten(0, 1))
        return Entry(layer, (recording.attn_out[layer][:, start:] + made).flatten(0, 1), "mid")


def _cut(value: Tensor, start: int, dim: int = 1) -> Tensor:
    """From column `start` on, where the value has columns."""
    return value.narrow(dim, start, value.shape[dim] - start) if value.shape[dim] > 1 else value


def sweep(
    cells: Cells,
    metric: Metric,
    layers: Sequence[int],
    columns: Sequence[Column],
    parts: Sequence[int] | None = None,
    *,
    unchanged: Tensor,
    rows: int,
    advance: Callable[[int], None] = lambda cells: None,
) -> Tensor:
    """The metric of every cell, (batch, layer, column, part); at most `rows` rows run at a time, one cell at least.

    Cells that change nothing have the metric `unchanged` (batch,).
    """
    recording, size, count = cells.recording, len(cells.recording.batch), 1 if parts is None else len(parts)
    each = max(1, min(count, rows // size))
    chunks = [slice(i, min(i + each, count)) for i in range(0, count, each)]
    found = unchanged.repeat(len(layers), len(columns), count, 1)
    pending: list[tuple[Entry, Tensor]] = []

    def finished(start: int) -> None:
        if pending:
            pending.sort(key=lambda entered: entered[0].layer)  # as they come out
            values = _measured(recording, metric, [entry for entry, _ in pending], start)
            for (_, place), value in zip(pending, values.split([len(place) for _, place in pending]), strict=True):
                place.copy_(value)
            advance(len(values))
            pending.clear()

    for start, group in _together(recording, columns, len(layers) * count):
        for i, layer in enumerate(layers):
            for j in group:
                column = replace(columns[j], start=start)
                if not cells.changes(layer, column):
                    advance(count)
                    continue
                for chunk in chunks:
                    entry = cells.entry(layer, column, None if parts is None else parts[chunk])
                    if sum(len(e.value) for e, _ in pending) + len(entry.value) > rows:
                        finished(start)
                    pending.append((entry, found[i, j, chunk]))
        finished(start)
    return found.permute(3, 0, 1, 2)


def _together(recording: Recording, columns: Sequence[Column], cells: int) -> Iterator[tuple[int, list[int]]]:
    """Columns that run together, and from where: some tokens too many are cheaper than calling small blocks again."""
    block = recording.anatomy.blocks[0]
    token = sum(parameter.numel() for parameter in block.parameters())
    mean_rows = max(1, len(recording.batch) * cells // 2)
    group: list[int] = []
    for j, column in enumerate(columns):
        starts = [columns[i].start for i in [*group, j]]
        wasted = (sum(starts) - len(starts) * min(starts)) * mean_rows * token
        if group and (column.columns is None or wasted > len(group) * CALL):
            yield min(columns[i].start for i in group), group
            group = []
        group.append(j)
    if group:
        yield min(columns[i].start for i in group), group


def _measured(recording: Recording, metric: Metric, pending: list[Entry], start: int) -> Tensor:
    """(groups, batch) the metric behind some entries."""
    anatomy, size = recording.anatomy, len(recording.batch)
    if metric.needs != "all":
        final = anatomy.final_norm(finish(recording, pending, start))
        return metric.of_final(final.unflatten(0, (-1, size)), anatomy)
    logits = anatomy.logits(anatomy.final_norm(finish(recording, pending, start, everywhere=True)))
    before = recording.logits()[:, :start]
    groups = logits.unflatten(0, (-1, size))
    return torch.stack([metric.value(torch.cat([before, group], 1)) for group in groups])
