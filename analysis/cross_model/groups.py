"""Groups of components written from one model's pass into another's: what is written where, and what comes of it.

All groups run through the target together: a group joins at its first layer, weights are read once for all of them, and
only columns from the first one that any of them touches on are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from analysis.metrics import Metric
from analysis.patching.resumed import Change, changed, column_of, measured, through, unchanged
from analysis.patching.run import Progress
from surgery.activations.passes import run
from surgery.activations.recording import Recording, record
from surgery.activations.resume import at_last, grouped, last_token
from surgery.anatomy import Anatomy, Site, anatomy_of
from surgery.errors import SurgeryError
from surgery.models import Batch, untouched

# ---- groups as writes ----------------------------------------------------------------------------------------------


class Write(NamedTuple):
    """The source's value of `site` (a whole one, or one head or neuron) where `where` (batch, pos) says so."""

    site: Site
    where: Tensor


class Group(NamedTuple):
    """What is written, and under inputs the only column (batch,) that feels it."""

    writes: list[Write]
    column: Tensor | None

    def select(self, rows: slice) -> Group:
        """The same for some of the examples."""
        writes = [Write(site, where[rows]) for site, where in self.writes]
        return Group(writes, None if self.column is None else self.column[rows])


def group_of(anatomy: Anatomy, batch: Batch, sites: Sequence[Site], name: str, place: Any, sources: str) -> Group:
    """What a group's components write, standing at `place` unless they name a position themselves.

    Raises `SurgeryError` for positions that a prompt has not, and under inputs for what has no q, k and v.
    """
    columns = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    if sources == "outputs":
        writes = []
        for site in sites:
            at = place if site.position is None else site.position
            where = batch.mask if at is None else columns == column_of(at, batch, f"group '{name}'")[:, None]
            writes.append(Write(Site(site.name, site.layer, site.head), where))
        return Group(writes, None)
    letters = "qkv" if sources == "inputs" else sources
    if not letters or set(letters) - set("qkv"):
        raise SurgeryError(f"sources={sources!r}: expected 'outputs', 'inputs' or some of 'q', 'k' and 'v'.")
    if wrong := [site for site in sites if site.name not in "zqkv"]:
        raise SurgeryError(f"'{wrong[0]}' of group '{name}' has no q, k or v.", hint="Name heads: z.3.2 or q.3.2.")
    if len(named := {site.position for site in sites}) > 1:
        raise SurgeryError(f"Group '{name}' stands at several positions, {sorted(map(str, named))}: inputs are felt at "
                           "one.", hint="Make it several groups.")  # fmt: skip
    at = next(iter(named)) if named != {None} else -1 if place is None else place
    column = column_of(at, batch, f"group '{name}'")
    here, before = columns == column[:, None], columns < column[:, None]
    places = {"q": here, "k": before, "v": before}
    found: dict[Site, Tensor] = {}
    for site in sites:
        for letter in letters if site.name == "z" else site.name:
            shared = site.head is not None and letter != "q" and site.name == "z"
            head = site.head // anatomy.group if shared and site.head is not None else site.head
            found[Site(letter, site.layer, head)] = places[letter]
    return Group([Write(*item) for item in found.items()], column)


# ---- running them --------------------------------------------------------------------------------------------------


def effects_of(
    source: Any,
    target: Any,
    batch: Batch,
    metric: Metric,
    groups: Sequence[Group],
    budget: int,
    progress: Progress | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Effects (example, group) on the target, and the metric (example,) of target and source as they are."""
    sites = list(dict.fromkeys(write.site.whole for group in groups for write in group.writes))
    size, rows = _sizes(target, batch, metric, sites, budget)
    found, before, after, done = [], [], [], 0
    with untouched(target, source):
        for begin in range(0, len(batch), size):
            part = slice(begin, begin + size)
            some, own = batch.select(part), metric.select(part)
            values, answered = _of_source(source, some, own, sites)
            after.append(answered)
            recording = record(target, some)
            before.append(unchanged(recording, own))
            effects = []
            for few in _chunks([group.select(part) for group in groups], max(1, rows // len(some))):
                with_them = _outputs if few[0].column is None else _inputs
                effects.append(with_them(recording, own, few, values) - before[-1])
                done += len(few) * len(some)
                if progress is not None:
                    progress(done, len(groups) * len(batch))
            found.append(torch.cat(effects).T)
    return torch.cat(found), torch.cat(before), torch.cat(after)


def _of_source(source: Any, batch: Batch, metric: Metric, sites: Sequence[Site]) -> tuple[dict[Site, Tensor], Tensor]:
    """The values of sites (batch, pos, ...) on the target's device, and the metric (batch,)."""
    anatomy, metric = anatomy_of(source), metric.to(source.device)
    end = f"resid_post.{anatomy.n_layers - 1}@-1"
    logits, seen = run(source, batch, [*sites, end], stop=metric.needs != "all")
    if logits is None:
        answered = metric.of_final(anatomy.final_norm(seen[end])[None], anatomy)[0]
    else:
        answered = metric.value(logits)
    return {site: seen[site].to(batch.ids.device) for site in sites}, answered.to(batch.ids.device)


def _chunks(groups: Sequence[Group], size: int) -> Iterator[list[Group]]:
    """Up to `size` groups at a time, which are felt in the same column if in one."""
    few: list[Group] = []
    for group in groups:
        same = not few or group.column is None or few[0].column is None or torch.equal(group.column, few[0].column)
        if len(few) == size or not same:
            yield few
            few = []
        few.append(group)
    yield few


def _outputs(recording: Recording, metric: Metric, groups: Sequence[Group], values: Mapping[Site, Tensor]) -> Tensor:
    """(group, batch) the metric with each group written in; groups join where their first layer is."""
    start = _first_column(groups)
    order, joining = _joining(groups)
    stream, under_way = recording.stream[0][:0, start:], list[Group]()
    for layer in range(min(joining), recording.anatomy.n_layers):
        new = joining.get(layer, [])
        under_way += new
        stream = torch.cat([stream, grouped(recording.stream[layer][:, start:], len(new))]) if new else stream
        changes = _changes(under_way, layer, len(recording.batch), values, {"": slice(start, None)})
        stream = through(recording, stream, start, [layer], changes)
    return measured(recording, metric, stream, start)[order]


def _inputs(recording: Recording, metric: Metric, groups: Sequence[Group], values: Mapping[Site, Tensor]) -> Tensor:
    """(group, batch) likewise, of groups whose new q, k and v are felt in one column.

    That column is run by itself, as the last token of prompts that end there: all before it is as recorded. Where it is
    not the last, the columns behind it are run on what it has become.
    """
    column, size = groups[0].column, len(recording.batch)
    assert column is not None
    start, layers = int(column.min()), recording.anatomy.n_layers
    place = torch.arange(recording.batch.ids.shape[1], device=column.device)
    ended = replace(recording, batch=Batch(recording.batch.ids, recording.batch.mask & (place <= column[:, None])))
    at_end = torch.equal(column, recording.last)
    order, joining = _joining(groups)
    own = [at_last(ended, stream, 0) for stream in recording.stream]
    alone, behind, under_way = own[0][:0], recording.stream[0][:0, start:], list[Group]()
    for layer in range(min(joining), layers):
        new = joining.get(layer, [])
        under_way += new
        alone = torch.cat([alone, grouped(own[layer], len(new))])
        behind = torch.cat([behind, grouped(recording.stream[layer][:, start:], len(new))])
        here = [w for group in under_way for w in group.writes if w.site.layer == layer and w.site.name in ("k", "v")]
        first = 0 if here else start
        stream = _put(grouped(recording.stream[layer][:, first:], len(under_way)), alone, column - first)
        # Keys and values are made of all columns at once, and the query is made of its column by itself.
        changes = _changes(under_way, layer, size, values, {"q": column, "": slice(first, None)})
        with changed(recording, layer, changes):
            alone = last_token(ended, layer, stream, first)
        if at_end:
            behind = grouped(recording.stream[layer + 1][:, start:], len(under_way))
        else:
            behind = through(recording, behind, start, [layer], {})
        behind = _put(behind, alone, column - start)
    return measured(recording, metric, behind, start)[order]


def _put(stream: Tensor, column: Tensor, at: Tensor) -> Tensor:
    """(rows, pos, d_model) with `column` (rows, d_model) in the place `at` (batch,) of each row."""
    stream = stream.clone()
    stream[torch.arange(len(stream), device=stream.device), at.repeat(len(stream) // len(at))] = column
    return stream


def _first_column(groups: Sequence[Group]) -> int:
    """The first column in which anything is written."""
    return int(torch.stack([write.where.any(0) for group in groups for write in group.writes]).any(0).int().argmax())


def _joining(groups: Sequence[Group]) -> tuple[Tensor, dict[int, list[Group]]]:
    """Groups by their first layer, and where each stands when they have joined in that order."""
    first = [min(write.site.layer or 0 for write in group.writes) for group in groups]
    order = sorted(range(len(groups)), key=first.__getitem__)
    joining: dict[int, list[Group]] = {}
    for g in order:
        joining.setdefault(first[g], []).append(groups[g])
    return torch.tensor(order).argsort(), joining


def _changes(
    groups: Sequence[Group], layer: int, size: int, values: Mapping[Site, Tensor], columns: Mapping[str, Any]
) -> dict[Site, Change]:
    """The writes of a layer, by site: each changes the rows of its own group.

    `columns` are those that a site's value holds when it is to be changed, a slice or one a row, by its name ("": of
    all others); values of another width are left as they are.
    """
    todo: dict[Site, list[tuple[int, Write]]] = {}
    for slot, group in enumerate(groups):
        for write in group.writes:
            if write.site.layer == layer:
                todo.setdefault(write.site.whole, []).append((slot, write))

    def change(site: Site) -> Change:
        held = columns.get(site.name, columns[""])
        new = _held(values[site], held)

        def written(value: Tensor) -> Tensor | None:
            if value.shape[1] != new.shape[1]:
                return None
            value = value.clone()
            for slot, write in todo[site]:
                part, there, where = value[slot * size : (slot + 1) * size], new, _held(write.where, held)
                if write.site.head is not None:
                    part, there = part[:, :, write.site.head], new[:, :, write.site.head]
                part[where] = there[where].to(part.dtype)
            return value

        return written

    return {site: change(site) for site in todo}


def _held(value: Tensor, columns: slice | Tensor) -> Tensor:
    """(batch, columns, ...) some columns of (batch, pos, ...)."""
    if isinstance(columns, slice):
        return value[:, columns]
    return value[torch.arange(len(value), device=value.device), columns][:, None]


def _sizes(target: Any, batch: Batch, metric: Metric, sites: Sequence[Site], budget: int) -> tuple[int, int]:
    """Examples recorded at a time, and rows run at a time, that keep within the budget (one of each at least)."""
    anatomy, each = anatomy_of(target), batch.ids.shape[1] * next(target.parameters()).element_size()
    heads = anatomy.n_heads * anatomy.d_head
    mlp = 4 * anatomy.d_model if anatomy.family.down is None else anatomy.d_mlp()
    wide = {"stream": anatomy.d_model, "heads": heads, "neurons": mlp}
    kept = anatomy.n_layers * (2 * anatomy.d_model + 2 * anatomy.n_kv_heads * anatomy.d_head)
    kept += sum(wide[site.kind] for site in sites)
    row = 8 * anatomy.d_model + 2 * mlp + 3 * heads
    if metric.needs == "all":
        kept, row = kept + anatomy.head.weight.shape[0], row + 2 * anatomy.head.weight.shape[0]
    size = max(1, min(len(batch), int(budget / 2 / (kept * each))))
    if not metric.divisible:  # a plain function of logits knows its examples all together
        size = len(batch)
    return size, max(1, int((budget - size * kept * each) / (row * each)))
