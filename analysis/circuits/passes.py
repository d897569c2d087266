"""Runs of a model in which only some heads speak: what all others say is replaced, at every position.

A variant is the whole model but for some heads, or nothing but some heads, each at its position. One of them is run
whole and recorded; another is computed from the first layer and position on at which it differs from that one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from analysis.circuits.ablation import Ablation, Align, Replaced, reference_of, replacement
from analysis.circuits.groups import EVERYWHERE, Circuit, Spot
from analysis.metrics import Metric, as_metric
from analysis.patching.run import BUDGET
from analysis.paths.branches import Change, Cost, Part, grown, measured, sizes, unchanged
from analysis.positions import Position, columns_of, found
from surgery.activations.interventions import edit, unwrapped
from surgery.activations.recording import Recording, record
from surgery.anatomy import Anatomy, Site, anatomy_of
from surgery.models import Batch, as_batch, untouched

Progress = Callable[[int, int], None]
"""Called with (variants done, variants in all), counted once an example."""


@dataclass(frozen=True)
class Variant:
    """The whole model but for `heads` (`whole=True`), or nothing but `heads`."""

    whole: bool
    heads: frozenset[Spot] = frozenset()


class Settings(TypedDict, total=False):
    """How circuits are measured."""

    ablation: Ablation
    """What heads that are left out say: "mean" (default), "resample", "counterfactual", "zero"."""
    reference: Any
    """Prompts that this is taken from; the prompts themselves by default."""
    positions: Mapping[str, Position] | None
    """What the names of groups' positions mean."""
    align: Align | None
    """For prompts of unequal length: their places correspond from the "start" or from the "end"."""
    seed: int
    tokenizer: Any
    budget: int
    """Bytes that the passes may take beside the model."""
    progress: Progress | None


@dataclass(frozen=True)
class Setting:
    """How circuits are measured: prompts, metric, and what takes the place of heads that are left out."""

    model: Any
    prompts: Batch
    metric: Metric
    ablation: Ablation
    reference: Batch
    positions: Mapping[str, Position] | None
    align: Align | None
    seed: int
    budget: int
    progress: Progress | None

    @classmethod
    def of(cls, model: Any, prompts: Any, metric: Metric | Callable[[Tensor], Tensor], given: Settings) -> Setting:
        """Checked: raises `SurgeryError` for prompts and a reference that do not fit each other or the metric."""
        ablation, align, seed = given.get("ablation", "mean"), given.get("align"), given.get("seed", 0)
        reference, tokenizer = given.get("reference"), given.get("tokenizer")
        model = unwrapped(model)
        own = as_batch(prompts, tokenizer).to(model.device).right_padded()
        others = None if reference is None else as_batch(reference, tokenizer).to(model.device).right_padded()
        metric = as_metric(metric).to(model.device)
        metric.check(len(own))
        others = reference_of(own, others, ablation, align, seed)
        return cls(model, own, metric, ablation, others, given.get("positions"), align, seed,
                   given.get("budget", BUDGET), given.get("progress"))  # fmt: skip

    @property
    def anatomy(self) -> Anatomy:
        """Of the model."""
        return anatomy_of(self.model)

    def columns(self, spots: frozenset[Spot]) -> dict[int | str, Tensor]:
        """(batch,) the column of every position that is named; "all" has none."""
        names = sorted({spot.position for spot in spots} - {EVERYWHERE}, key=str)
        what = "A group of the circuit"
        return {
            name: columns_of(found(name, self.positions, what), self.prompts, f"position '{name}'") for name in names
        }

    def variant(self, circuit: Circuit, *, but: bool = False) -> Variant:
        """Only the circuit, or all but the circuit. Raises `SurgeryError` for heads that the model has not."""
        circuit.check(self.anatomy)
        return Variant(but, circuit.spots)

    def values(self, variants: Sequence[Variant], against: Variant | None = None) -> tuple[Tensor, dict[str, Any]]:
        """The metric of every variant, (example, variant), and what is to be told about it.

        `against` is recorded for variants of its kind, in place of the whole model and the model without any head.
        """
        anatomy, prompts = self.anatomy, self.prompts
        bases = [Variant(True), Variant(False)]
        if against is not None:
            bases[0 if against.whole else 1] = against
        columns = self.columns(frozenset().union(*(v.heads for v in [*variants, *bases])))
        cost, width = Cost(anatomy, prompts.ids.numel()), prompts.ids.shape[1]
        heads = anatomy.n_heads * anatomy.d_head
        size, step = sizes(self.model, anatomy, len(prompts), width, 2 * heads, width,
                           self.metric.needs == "all", self.budget)  # fmt: skip
        rows_found, done = [], 0
        with untouched(self.model):
            ablated = replacement(self.model, self.ablation, self.prompts, self.reference, self.align, self.budget)
            for begin in range(0, len(prompts), size):
                rows = slice(begin, begin + size)
                part = replace(self, prompts=prompts.select(rows), metric=self.metric.select(rows))
                here = {name: column[rows] for name, column in columns.items()}
                replaced = ablated(rows)
                value = torch.zeros(len(part.prompts), len(variants), device=self.model.device)
                for base in bases:
                    mine = [i for i, variant in enumerate(variants) if variant.whole == base.whole]
                    if not mine:
                        continue
                    run_of = _Run(part, replaced, here, base, cost)
                    for chosen in run_of.passes([variants[i] for i in mine], step):
                        at = [mine[i] for i in chosen]
                        value[:, at] = run_of.values([variants[i] for i in at]).T
                        done += len(at) * len(part.prompts)
                        if self.progress is not None:
                            self.progress(done, len(variants) * len(prompts))
                rows_found.append(value)
        told = {"model": anatomy.name, "metric": self.metric.name, "ablation": self.ablation, "seed": self.seed,
                "cost": {"forwards": round(cost.forwards(), 3), "loop": len(variants)}}  # fmt: skip
        return torch.cat(rows_found), told


class _Run:
    """Some prompts, with one variant recorded."""

    def __init__(
        self, setting: Setting, ablated: Replaced, columns: Mapping[int | str, Tensor], base: Variant, cost: Cost
    ) -> None:
        self.setting, self.ablated, self.columns, self.base, self.cost = setting, ablated, columns, base, cost
        self.anatomy, batch = setting.anatomy, setting.prompts
        width = batch.ids.shape[1]
        whole = Part(range(1), torch.arange(width, device=batch.ids.device).expand(len(batch), -1))
        edits: dict[str | Site, Any] = {s: _called(change, whole) for s, change in self._changes([base]).items()}
        with edit(setting.model, edits):
            self.recording: Recording = record(setting.model, batch)
        cost.blocks(range(self.anatomy.n_layers), batch.ids.numel())

    def passes(self, variants: Sequence[Variant], step: int) -> list[list[int]]:
        """Which of the variants run together: at most `step`, that differ from the same column on."""
        starts = [self._start(variant) for variant in variants]
        order = sorted(range(len(variants)), key=lambda i: (starts[i], self._layer(variants[i])))
        found: list[list[int]] = []
        for i in order:
            if not found or len(found[-1]) == step or starts[found[-1][0]] != starts[i]:
                found.append([])
            found[-1].append(i)
        return found

    def values(self, variants: Sequence[Variant]) -> Tensor:
        """(variant, batch) of variants that differ from the recorded one from the same column on, by first layer."""
        metric, size = self.setting.metric, len(self.setting.prompts)
        every, start = metric.needs == "all", self._start(variants[0])
        self.cost.made += len(variants) * size * (self.recording.batch.ids.shape[1] if every else 1) * self.cost.head
        if not variants[0].heads ^ self.base.heads:
            return unchanged(self.recording, metric).expand(len(variants), -1)
        layers = [self._layer(variant) for variant in variants]
        joining = {layer: layers.count(layer) for layer in sorted(set(layers))}
        changes = self._changes(variants)
        rows = grown(self.recording, joining, start, changes, self.cost, whole=every)
        return measured(self.recording, metric, rows, start)

    def _start(self, variant: Variant) -> int:
        """The first column at which it differs from what is recorded; behind all where it does not."""
        different = {spot.position for spot in variant.heads ^ self.base.heads}
        if EVERYWHERE in different:
            return 0
        width = self.recording.batch.ids.shape[1]
        return min((int(self.columns[position].min()) for position in different), default=width)

    def _layer(self, variant: Variant) -> int:
        return min((spot.layer for spot in variant.heads ^ self.base.heads), default=self.anatomy.n_layers)

    def _changes(self, variants: Sequence[Variant]) -> dict[Site, Change]:
        """What is done to z in every layer where a head is left out in any of them."""
        found = {}
        for layer in range(self.anatomy.n_layers):
            named: dict[int | str, Tensor] = {}
            for i, variant in enumerate(variants):
                for spot in variant.heads:
                    if spot.layer == layer:
                        empty = torch.zeros(len(variants), self.anatomy.n_heads, dtype=torch.bool)
                        named.setdefault(spot.position, empty)[i, spot.head] = True
            if named or not self.base.whole:
                on = {position: flags.to(self.setting.model.device) for position, flags in named.items()}
                found[Site("z", layer)] = self._change(layer, on)
        return found

    def _change(self, layer: int, named: Mapping[int | str, Tensor]) -> Change:
        kept_elsewhere = self.base.whole

        def change(z: Tensor, part: Part) -> Tensor:
            branches = slice(part.branches.start, part.branches.stop)
            hit = torch.zeros(len(part.branches), *part.columns.shape, z.shape[2], dtype=torch.bool, device=z.device)
            for position, flags in named.items():
                column = self.columns.get(position)
                here = torch.ones_like(part.columns, dtype=torch.bool)
                if column is not None:
                    here = part.columns == column[:, None]
                hit |= here[None, :, :, None] & flags[branches, None, None]
            kept = hit ^ kept_elsewhere
            other = self.ablated.at(layer, part.columns).to(z.dtype)
            other = other.expand(len(part.columns), *other.shape[1:]).repeat(len(part.branches), 1, 1, 1)
            return torch.where(kept.flatten(0, 1)[..., None], z, other)

        return change


def _called(change: Change, part: Part) -> Callable[[Tensor], Tensor]:
    return lambda value: change(value, part)
