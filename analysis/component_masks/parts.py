"""What a component mask is made of: parts of sites that are mixed with their counterfactual values, and the passes.

Of every batch only what a mask can change is run: from the lowest masked layer on, and from the first masked column on;
the stream below, the keys and values to the left and all counterfactual values are computed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from analysis.metrics import accuracy
from analysis.patching.resumed import column_of, components, through
from surgery.activations.passes import run
from surgery.activations.recording import Recording, record
from surgery.activations.resume import at_last
from surgery.anatomy import Anatomy, Site, anatomy_of
from surgery.anatomy.model import width
from surgery.errors import SurgeryError
from surgery.models import Batch, as_batch

Place = int | str | None
"""A position (negative ones from the last token), the name of an anchor, or None: all positions."""


@dataclass(frozen=True, eq=False)
class Desideratum:
    """What should come out when what matters is patched: `target` after `prompts` with parts of `counterfactuals`.

    Prompts come in pairs, in any form that `surgery.models.encode` takes; `target` (examples,) are token ids. Pairs may
    differ in length: `anchors` name places that correspond, {name: (in each prompt, in each counterfactual)}, each a
    number or one an example, negative from the last token.
    """

    name: str
    prompts: Any
    counterfactuals: Any
    target: Any
    anchors: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)


# ---- components ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Part:
    """Components of one site and place that share its value: heads, neurons, directions, or the whole as one."""

    site: Site
    """Its name and layer; the head too where its directions are the components."""
    place: Place
    size: int
    """How many components."""
    heads: tuple[int, ...] | None = None
    """Which heads or neurons they are; None: the value as a whole, or directions of it."""
    basis: Tensor | None = None
    """(size, d) orthonormal directions of the value, its axes behind the positions flattened."""

    @property
    def labels(self) -> list[str]:
        """The names of the components: z.3.2@-1, resid_post.2@query, and resid_post.2[5]@-1 for a direction."""
        at = "" if self.place is None else f"@{self.place}"
        if self.heads is not None:
            return [f"{self.site}.{head}{at}" for head in self.heads]
        if self.basis is not None:
            return [f"{self.site}[{i}]{at}" for i in range(self.size)]
        return [f"{self.site}{at}"]

    def mixed(self, value: Tensor, other: Tensor, w: Tensor) -> Tensor:
        """w * value + (1 - w) * other for each component, of (..., d) or (..., head, d_head); the rest is `value`."""
        w = w.to(value.device)
        if self.basis is not None:
            old, new = (value, other) if self.site.head is None else (_head(value, self.site), _head(other, self.site))
            axes = 1 if self.site.kind != "heads" or self.site.head is not None else 2
            basis = self.basis.to(old)
            moved = (((new - old).flatten(-axes) @ basis.T) * (1 - w).to(old)) @ basis
            if self.site.head is None:
                return value + moved.unflatten(-1, value.shape[-axes:])
            value = value.clone()
            value[..., self.site.head, :] += moved
            return value
        if self.heads is None:
            return (w * value + (1 - w) * other).to(value.dtype)
        index = torch.tensor(self.heads, device=value.device)
        axis = -2 if self.site.kind == "heads" else -1
        each = w[:, None] if self.site.kind == "heads" else w
        new = (each * value.index_select(axis, index) + (1 - each) * other.index_select(axis, index)).to(value.dtype)
        return value.index_copy(axis, index, new)


def _head(value: Tensor, site: Site) -> Tensor:
    return value[..., site.head, :]


def parts_of(anatomy: Anatomy, names: Iterable[str | Site] | str, position: Place) -> list[Part]:
    """The parts of named components; heads and neurons of a site are one each where none is named.

    `position` is that of the sites that name none. Raises `SurgeryError` for what is no component, or named twice.
    """
    found: dict[tuple[Site, Place], list[int] | None] = {}
    for site in components(anatomy, names):
        key = (site.whole, position if site.position is None else site.position)
        count = anatomy.heads_of(site.name)
        if count is None:
            found[key] = None
            continue
        before = found.setdefault(key, [])
        assert before is not None
        before += [head for head in (range(count) if site.head is None else [site.head]) if head not in before]
    if not found:
        raise SurgeryError("No components were named.", hint="For instance components='z': all heads.")
    return [
        Part(site, place, 1 if heads is None else len(heads), None if heads is None else tuple(sorted(heads)))
        for (site, place), heads in found.items()
    ]


def directions_of(
    anatomy: Anatomy, names: Iterable[str | Site] | str, position: Place, rank: int, samples: Sequence[Sample]
) -> list[Part]:
    """The first `rank` right singular vectors of the value differences (examples, d) of each named site or head."""
    if rank < 1:
        raise SurgeryError(f"directions={rank}: at least one is needed.")
    found = []
    for site in components(anatomy, names):
        if site.head is not None and site.kind != "heads":
            raise SurgeryError(f"'{site}' is one number: it has no directions.", hint=f"Name '{site.whole}'.")
        part = Part(Site(site.name, site.layer, site.head), position if site.position is None else site.position, 1)
        differences = torch.cat([_differences(sample, part) for sample in samples]).float()
        basis = torch.linalg.svd(differences, full_matrices=False).Vh[:rank]
        found.append(replace(part, size=len(basis), basis=basis))
    return found


def _differences(sample: Sample, part: Part) -> Tensor:
    """(examples, d) counterfactual minus own value; at all real tokens where no place is named."""
    site = part.site.whole
    _, own = run(sample.model, sample.batch, [site], stop=True)
    value, other = own[site], sample.others([part])[site, part.place]
    here, _ = sample.columns[part.place]
    if here is None:
        value, other = value[sample.batch.mask], other[sample.batch.mask]
    else:
        value = value[torch.arange(len(value), device=value.device), here]
    difference = other - value
    return (difference if part.site.head is None else _head(difference, part.site)).flatten(1)


# ---- prompts that were run -----------------------------------------------------------------------------------------


@dataclass
class Sample:
    """Some examples of a desideratum, with what has been computed of them."""

    model: Any
    batch: Batch
    counterfactual: Batch
    target: Tensor
    columns: dict[Place, tuple[Tensor | None, Tensor | None]]
    """Of each place: (batch,) the column in the prompts and in the counterfactuals; None: all of them."""
    kept: _Kept | None = None

    @property
    def start(self) -> int:
        """The first column that a mask can change."""
        return min(0 if here is None else int(here.min()) for here, _ in self.columns.values())

    def others(self, parts: Sequence[Part]) -> dict[tuple[Site, Place], Tensor]:
        """The counterfactual values of parts: (batch, ...) at their place, or (batch, pos, ...) of all."""
        _, seen = run(self.model, self.counterfactual, list({part.site.whole for part in parts}), stop=True)
        rows = torch.arange(len(self.batch), device=self.batch.ids.device)
        found = {}
        for part in parts:
            value, (_, there) = seen[part.site.whole], self.columns[part.place]
            found[part.site.whole, part.place] = value if there is None else value[rows, there]
        return found

    def keep(self, parts: Sequence[Part], memory: int) -> int:
        """Computes what every pass needs, and keeps it when it takes no more than `memory` bytes; says how many."""
        if memory <= 0:
            return 0
        found = self._made(parts)
        taken = sum(t.nbytes for t in [found.stream, *found.others.values(), *found.lean.keys, *found.lean.values])
        self.kept = found if taken <= memory else None
        return taken if self.kept else 0

    def _made(self, parts: Sequence[Part]) -> _Kept:
        recording = record(self.model, self.batch)
        lowest, start, none = lowest_of(parts), self.start, recording.stream[0].new_empty(0)

        def left(tensors: list[Tensor]) -> list[Tensor]:
            return [none if layer < lowest else t[:, :, :start].clone() for layer, t in enumerate(tensors)]

        calls = [{} if layer < lowest else call for layer, call in enumerate(recording.calls)]
        lean = replace(recording, stream=[], attn_out=[], offset=[], final=None, calls=calls,
                       keys=left(recording.keys), values=left(recording.values))  # fmt: skip
        return _Kept(lean, recording.stream[lowest][:, start:].clone(), self.others(parts))

    def final(self, parts: Sequence[Part], w: Tensor, kept: _Kept | None = None) -> Tensor:
        """(batch, d_model) what the head reads at the last token, with the mask `w` (components,)."""
        kept = kept or self.kept or self._made(parts)
        anatomy, start = kept.lean.anatomy, self.start
        changes: dict[Site, Any] = {}
        offset = 0
        for part in parts:
            changes.setdefault(part.site.whole, []).append((part, w[offset : offset + part.size]))
            offset += part.size

        def change(site: Site) -> Any:
            def mix(value: Tensor) -> Tensor:
                for part, mask in changes[site]:
                    other, (here, _) = kept.others[site, part.place], self.columns[part.place]
                    if here is None:
                        value = part.mixed(value, other[:, start:], mask)
                        continue
                    rows = torch.arange(len(value), device=value.device)
                    new = part.mixed(value[rows, here - start], other, mask)
                    value = value.index_put((rows, here - start), new)
                return value

            return mix

        layers = range(lowest_of(parts), anatomy.n_layers)
        stream = through(kept.lean, kept.stream, start, layers, {site: change(site) for site in changes})
        return anatomy.final_norm(at_last(kept.lean, stream, start))

    @torch.no_grad()
    def correct(self, parts: Sequence[Part], masks: Sequence[Tensor]) -> Tensor:
        """(masks, batch) 1 where the likeliest next token is the target."""
        kept = self.kept or self._made(parts)
        final = torch.stack([self.final(parts, w, kept) for w in masks])
        return accuracy(self.target).of_final(final, kept.lean.anatomy)


@dataclass
class _Kept:
    """The recorded pass without what no mask reaches, the stream where it is taken up, and counterfactual values."""

    lean: Recording
    stream: Tensor
    others: dict[tuple[Site, Place], Tensor]


def lowest_of(parts: Sequence[Part]) -> int:
    """The lowest layer of some parts."""
    return min(part.site.layer or 0 for part in parts)


def pairs_of(
    model: Any, desideratum: Desideratum, places: Sequence[Place], tokenizer: Any
) -> tuple[Batch, Batch, Tensor, dict[Place, tuple[Tensor | None, Tensor | None]]]:
    """Prompts, counterfactuals, target and columns of a desideratum. Raises `SurgeryError` when they don't fit."""
    name = f"'{desideratum.name}'"
    batch = as_batch(desideratum.prompts, tokenizer).to(model.device).right_padded()
    other = as_batch(desideratum.counterfactuals, tokenizer).to(model.device).right_padded()
    if len(batch) != len(other):
        raise SurgeryError(f"Desideratum {name} has {len(batch)} prompts and {len(other)} counterfactuals: they come "
                           "in pairs.")  # fmt: skip
    target = torch.as_tensor(desideratum.target, device=model.device)
    if target.shape != (len(batch),) or target.is_floating_point() or target.dtype == torch.bool:
        raise SurgeryError(f"Desideratum {name}: the target is one token id an example, ({len(batch)},), and not "
                           f"{tuple(target.shape)} of {target.dtype}.")  # fmt: skip
    known = width(anatomy_of(model).head, output=True)
    if bool((wrong := (target < 0) | (target >= known)).any()):
        raise SurgeryError(f"Desideratum {name}: token {int(target[wrong][0])} is not among the model's {known}.")
    columns: dict[Place, tuple[Tensor | None, Tensor | None]] = {}
    for place in dict.fromkeys(places):
        if place is None:
            if bool((differ := batch.lengths != other.lengths).any()):
                row = int(differ.int().argmax())
                raise SurgeryError(
                    f"Desideratum {name}, pair {row}: the prompt is {int(batch.lengths[row])} tokens long, its "
                    f"counterfactual {int(other.lengths[row])}; position by position they don't correspond.",
                    hint="Choose a position, or name places that correspond in `anchors`.",
                )
            columns[None] = None, None
            continue
        if isinstance(place, str) and place not in desideratum.anchors:
            known_anchors = ", ".join(desideratum.anchors) or "none"
            raise SurgeryError(f"Desideratum {name} has no anchor '{place}'.", hint=f"Its anchors: {known_anchors}.")
        here, there = desideratum.anchors[place] if isinstance(place, str) else (place, place)
        what = f"{place} of desideratum {name}"
        columns[place] = column_of(here, batch, what), column_of(there, other, f"{what} (counterfactual)")
    return batch, other, target.long(), columns


def samples_of(
    model: Any, pairs: tuple[Batch, Batch, Tensor, dict[Place, Any]], rows: Tensor, size: int
) -> list[Sample]:
    """Rows of a desideratum in batches, each as wide as its longest prompt."""
    batch, other, target, columns = pairs
    found = []
    for some in rows.to(batch.ids.device).split(size) if len(rows) else ():
        of = {place: tuple(None if c is None else c[some] for c in pair) for place, pair in columns.items()}
        found.append(Sample(model, _cut(batch.select(some)), _cut(other.select(some)), target[some], of))  # type: ignore[arg-type]
    return found


def _cut(batch: Batch) -> Batch:
    longest = int(batch.lengths.max())
    return Batch(batch.ids[:, :longest], batch.mask[:, :longest])
