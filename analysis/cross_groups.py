"""Groups of components written from one model's pass into another's: what is written where, and what comes of it.

All groups run through the target together: a group joins at its first layer, weights are read once for all of them, and
only columns from the first one that any of them touches on are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from analysis.metrics import Metric
from analysis.patching_sweep import Progress
from analysis.resumed import Change, column_of, measured, through, unchanged
from surgery.activations.passes import run
from surgery.activations.recording import Recording, record
from surgery.activations.resume import grouped
from surgery.anatomy import Anatomy, Site, anatomy_of
from surgery.errors import SurgeryError
from surgery.models import Batch, untouched

# ---- groups as writes ----------------------------------------------------------------------------------------------


class Write(NamedTuple):
    """The source's value of `site` (a whole one, or one head or neuron) where `where` (batch, pos) says so."""

    site: Site
    where: Tensor


class Group(NamedTuple):
    """What is written, and under inputs the only column (batch, pos) that feels it."""

    writes: list[Write]
    felt: Tensor | None

    def select(self, rows: slice) -> Group:
        """The same for some of the examples."""
        writes = [Write(site, where[rows]) for site, where in self.writes]
        return Group(writes, None if self.felt is None else self.felt[rows])


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
    column = column_of(at, batch, f"group '{name}'")[:, None]
    places = {"q": columns == column, "k": columns < column, "v": columns < column}
    found: dict[Site, Tensor] = {}
    for site in sites:
        for letter in letters if site.name == "z" else site.name:
            shared = site.head is not None and letter != "q" and site.name == "z"
            head = site.head // anatomy.group if shared and site.head is not None else site.head
            found[Site(letter, site.layer, head)] = places[letter]
    return Group([Write(*item) for item in found.items()], columns == column)


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
            for few in _chunks(groups, max(1, rows // len(some))):
                patched = _metric_of(recording, own, [group.select(part) for group in few], values)
                effects.append(patched - before[-1])
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


def _chunks(groups: Sequence[Group], size: int) -> Iterator[Sequence[Group]]:
    return (groups[i : i + size] for i in range(0, len(groups), size))


def _metric_of(recording: Recording, metric: Metric, groups: Sequence[Group], values: Mapping[Site, Tensor]) -> Tensor:
    """(group, batch) the metric with each group written in; groups join where their first layer is."""
    reached = torch.stack([write.where.any(0) for group in groups for write in group.writes]).any(0)
    start = int(reached.int().argmax())
    if not bool(reached.any()):  # k and v before the first token
        return unchanged(recording, metric).expand(len(groups), -1)
    first = [min(write.site.layer or 0 for write in group.writes) for group in groups]
    order = sorted(range(len(groups)), key=first.__getitem__)
    confined = groups[0].felt is not None
    at_end = all(
        bool((group.felt[:, start:].int().argmax(1) + start == recording.last).all())
        for group in groups
        if group.felt is not None
    )
    alone = recording.stream[0].new_zeros(0, *recording.stream[0][0, start:].shape)
    stream, under_way = alone, list[Group]()
    for layer in range(first[order[0]], recording.anatomy.n_layers):
        if new := [groups[g] for g in order if first[g] == layer]:
            begun = grouped(recording.stream[layer][:, start:], len(new))
            under_way += new
            stream, alone = torch.cat([stream, begun]), torch.cat([alone, begun]) if confined else alone
        changes = _changes(under_way, layer, start, len(recording.batch), values)
        if not confined:
            stream = through(recording, stream, start, [layer], changes)
            continue
        # By itself: the group's column sees its new inputs, and is all that differs from the recorded pass.
        felt = torch.cat([group.felt[:, start:] for group in under_way if group.felt is not None])[..., None]
        own = grouped(recording.stream[layer + 1][:, start:], len(under_way))
        alone = torch.where(felt, through(recording, alone, start, [layer], changes), own)
        # As the answer sees it: later columns read what that column has become, and none of the new inputs.
        stream = alone if at_end else torch.where(felt, alone, through(recording, stream, start, [layer], {}))
    found = measured(recording, metric, stream, start)
    back = torch.empty(len(order), dtype=torch.long)
    back[order] = torch.arange(len(order))
    return found[back.to(found.device)]


def _changes(
    groups: Sequence[Group], layer: int, start: int, size: int, values: Mapping[Site, Tensor]
) -> dict[Site, Change]:
    """The writes of a layer, by site: each changes the rows of its own group."""
    todo: dict[Site, list[tuple[int, Write]]] = {}
    for slot, group in enumerate(groups):
        for write in group.writes:
            if write.site.layer == layer:
                todo.setdefault(write.site.whole, []).append((slot, write))

    def change(site: Site) -> Change:
        def written(value: Tensor) -> Tensor:
            value = value.clone()
            for slot, write in todo[site]:
                part, new = value[slot * size : (slot + 1) * size], values[site][:, start:]
                if write.site.head is not None:
                    part, new = part[:, :, write.site.head], new[:, :, write.site.head]
                where = write.where[:, start:]
                part[where] = new[where].to(part.dtype)
            return value

        return written

    return {site: change(site) for site in todo}


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
    if metric.tokens is None and not metric.columns:  # a plain function of logits knows its examples all together
        size = len(batch)
    return size, max(1, int((budget - size * kept * each) / (row * each)))
