"""The passes of path patching, of which only what a change reaches is computed.

While attention is frozen tokens do not see each other: what a sender writes at one token changes that token's stream
alone, through the MLPs (`Frozen`). What receivers read of it is written into a recorded pass, which is taken up again
at the first receiver (`received`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from analysis.paths.branches import Change, Cost, Part, grown, weights_of
from surgery.activations.recording import _CACHE, Recording
from surgery.activations.resume import replaced, returning, written_by_heads
from surgery.anatomy import Site
from surgery.anatomy.points import first_tensor, projection

Sender = tuple[int, int]
"""Layer and head."""


@dataclass
class Frozen:
    """A recorded pass whose attention says what it said, but for one head at a time: a sender.

    `columns` (batch, count) are the tokens at which senders speak, and `difference` by layer what they say there more
    than in the recorded pass, (batch, count, head, d_head).
    """

    recording: Recording
    columns: Tensor
    difference: dict[int, Tensor]
    through_mlps: bool
    cost: Cost
    _rows: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._rows = torch.arange(len(self.columns), device=self.columns.device)[:, None]

    def at(self, value: Tensor) -> Tensor:
        """(batch, count, ...) of a recorded (batch, pos, ...)."""
        return value[self._rows, self.columns]

    def streams(self, senders: Sequence[Sender], stop: int) -> Iterator[tuple[int, Tensor]]:
        """(layer, stream entering it) up to layer `stop`: (senders * batch, count, d_model), the senders below it.

        Senders come in the order of their layers, and so do the groups of rows.
        """
        rows: Tensor | None = None
        for layer in range(senders[0][0], stop):
            heads = [head for at, head in senders if at == layer]
            parts = [] if rows is None else [self._above(layer, rows)]
            if heads:
                parts.append(self._sent(layer, heads))
            rows = torch.cat(parts)
            yield layer + 1, rows

    def _sent(self, layer: int, heads: Sequence[int]) -> Tensor:
        """The stream behind block `layer` for each of its heads."""
        recording, anatomy = self.recording, self.recording.anatomy
        made = written_by_heads(anatomy, layer, self.difference[layer], heads)
        self.cost.made += made.numel() * anatomy.d_head
        norm = anatomy.norm("attention_norm", layer)
        if norm is not None:  # it sees all heads together
            before = anatomy.out(layer)(self.at(recording.seen[f"z.{layer}"]).flatten(2))
            made = norm(before + made) - norm(before)
        if anatomy.parallel or not self.through_mlps:  # the MLP of this block does not read it, or is not to
            return (self.at(recording.stream[layer + 1]) + made).flatten(0, 1)
        stream = self.at(recording.stream[layer]).repeat(len(heads), 1, 1)
        return self._mlp(layer, stream, (self.at(recording.attn_out[layer]) + made).flatten(0, 1))

    def _above(self, layer: int, rows: Tensor) -> Tensor:
        """Block `layer` on streams that differ from the recorded one already."""
        recording, groups = self.recording, len(rows) // len(self.columns)
        if self.through_mlps:
            return self._mlp(layer, rows, self.at(recording.attn_out[layer]).repeat(groups, 1, 1))
        added = self.at(recording.stream[layer + 1]) - self.at(recording.stream[layer])
        return rows + added.repeat(groups, 1, 1)

    def _mlp(self, layer: int, stream: Tensor, added: Tensor) -> Tensor:
        """A block whose attention adds `added`: its other parts do what they do, in whatever order its code has."""
        recording, anatomy = self.recording, self.recording.anatomy
        self.cost.made += stream.shape[0] * stream.shape[1] * self.cost.mlp[layer]
        words = {name: None if value is _CACHE else value for name, value in recording.calls[layer].items()}
        inside = recording.offset[layer] is not None  # the family's attention adds the stream itself
        returned = stream + added if inside else added
        norm = anatomy.norm("attention_norm", layer)
        with ExitStack() as stack:
            stack.enter_context(replaced(anatomy.attention(layer), returning(returned, recording.returns)))
            if norm is not None:
                stack.enter_context(replaced(norm, lambda *_, **__: added))
            return first_tensor(anatomy.blocks[layer](stream, **words))


def to_logits(frozen: Frozen, senders: Sequence[Sender]) -> Tensor:
    """What the last block hands on at the columns, (senders * batch, count, d_model)."""
    *_, (_, rows) = frozen.streams(senders, frozen.recording.anatomy.n_layers)
    return rows


@dataclass
class Reading:
    """What receivers of one layer and one of q, k and v read: (senders * batch, count, receiver, d_head)."""

    site: Site
    heads: list[int]
    value: Tensor


def readings(frozen: Frozen, senders: Sequence[Sender], receivers: dict[Site, list[int]]) -> list[Reading]:
    """What the receivers (heads by site) read while each sender speaks, where any sender is below them."""
    anatomy, found = frozen.recording.anatomy, []
    layers = {site.layer for site in receivers}
    for layer, rows in frozen.streams(senders, max(layer or 0 for layer in layers)):
        if layer not in layers:
            continue
        norm = anatomy.norm("input_norm", layer)
        stream = rows if norm is None else norm(rows)
        for site, heads in receivers.items():
            if site.layer == layer:
                module, read, _ = projection(anatomy, site.name, layer)
                frozen.cost.made += rows.shape[0] * rows.shape[1] * weights_of(module)
                found.append(Reading(site, heads, read(module(stream))[:, :, heads]))
    return found


def received(
    frozen: Frozen,
    senders: Sequence[Sender],
    found: Sequence[Reading],
    at: Tensor,
    start: int,
    *,
    held: bool,
    whole: bool,
) -> Tensor:
    """The recorded pass with readings written into it: what the last block hands on, as `branches.grown` gives it.

    `at` (batch, count) says at which of the columns receivers are written to, none of them before `start`; `held`: at
    all others they read what is recorded, also where an earlier receiver has changed the stream. `whole`: all tokens
    are handed on, not only the last. A sender's branch begins at the first receiver above it.
    """
    recording = frozen.recording
    layers = sorted({reading.site.layer or 0 for reading in found})
    below = dict(zip(layers, [-1, *layers], strict=False))
    joining = {layer: sum(below[layer] <= at_layer < layer for at_layer, _ in senders) for layer in layers}
    changes = {reading.site: _writing(frozen, reading, at, held) for reading in found}
    return grown(recording, joining, start, changes, frozen.cost, whole=whole)


def _writing(frozen: Frozen, reading: Reading, at: Tensor, held: bool) -> Change:
    """Puts a reading into the site's value, whichever of the columns the pass computes."""
    size = len(at)

    def change(old: Tensor, part: Part) -> Tensor:
        match = (part.columns[:, :, None] == frozen.columns[:, None]) & at[:, None]
        count = len(part.branches)
        hit, which = match.any(2).repeat(count, 1), match.int().argmax(2).repeat(count, 1)
        rows = torch.arange(len(old), device=old.device)[:, None]
        before = old[:, :, reading.heads]
        if held:
            recorded = frozen.recording.seen[reading.site][:, :, reading.heads]
            before = recorded[rows % size, part.columns.repeat(count, 1)]
        read = reading.value[rows + part.branches.start * size, which].to(old.dtype)
        new = old.clone()
        new[:, :, reading.heads] = torch.where(hit[..., None, None], read, before)
        return new

    return change
