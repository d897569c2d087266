"""A recorded pass taken up again with several values changed on the way, in any layers, together.

`analysis.patching.cells` runs changes of one place each; here one change is a whole group of places (a circuit's heads,
a mask), and what the first of them does reaches the later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from analysis.metrics import Metric
from surgery.activations.interventions import detach
from surgery.activations.recording import Recording
from surgery.activations.resume import at_last, block
from surgery.anatomy import Anatomy, Site
from surgery.anatomy.points import Handle, attach
from surgery.errors import SurgeryError
from surgery.models import Batch

Change = Callable[[Tensor], Tensor | None]
"""The whole value of a site, from the first column that is run, to a new one; None leaves it as it is."""
UNFIT = ("embed", "final", "scores", "pattern")
"""Sites that are no components: they lie outside the blocks, or belong to pairs of tokens."""


def through(
    recording: Recording, stream: Tensor, start: int, layers: Iterable[int], changes: Mapping[Site, Change]
) -> Tensor:
    """Blocks one after the other on (rows, pos - start, d_model), with `changes` to the values of sites in them.

    Differentiable; the sites name a layer, and neither head nor position.
    """
    for layer in layers:
        with changed(recording, layer, changes):
            stream = block(recording, layer, stream, start)
    return stream


@contextmanager
def changed(recording: Recording, layer: int, changes: Mapping[Site, Change]) -> Iterator[None]:
    """The changes of one layer are made in whatever runs its block meanwhile."""
    handles: list[Handle] = []
    try:
        for site, change in changes.items():
            if site.layer == layer:
                handles += attach(recording.anatomy, site, change)
        yield
    finally:
        detach(handles)


def measured(recording: Recording, metric: Metric, stream: Tensor, start: int) -> Tensor:
    """(groups, batch) the metric behind the last block's output (groups * batch, pos - start, d_model)."""
    anatomy, size = recording.anatomy, len(recording.batch)
    if metric.needs != "all":
        final = anatomy.final_norm(at_last(recording, stream, start))
        return metric.of_final(final.unflatten(0, (-1, size)), anatomy)
    before = recording.logits()[:, :start]
    groups = anatomy.final_norm(stream).unflatten(0, (-1, size))
    return torch.stack([metric.value(torch.cat([before, anatomy.logits(group)], 1)) for group in groups])


def unchanged(recording: Recording, metric: Metric) -> Tensor:
    """(batch,) the metric of the recorded pass."""
    return measured(recording, metric, recording.stream[-1], 0)[0]


def column_of(position: Any, batch: Batch, what: str) -> Tensor:
    """(batch,) the column of a position in right-padded rows: one number, or one a row; negative from the last token.

    Raises `SurgeryError` naming the first row that has no such token.
    """
    given = torch.as_tensor(position, device=batch.ids.device)
    if given.is_floating_point() or given.dtype == torch.bool or given.dim() > 1:
        raise SurgeryError(f"The position of {what} is a whole number, or one for each prompt, and not {position!r}.")
    if given.dim() and len(given) != len(batch):
        raise SurgeryError(f"The positions of {what} are {len(given)}, and there are {len(batch)} prompts.")
    given = given.long().expand(len(batch))
    column = torch.where(given < 0, batch.lengths + given, given)
    if bool((wrong := (column < 0) | (column >= batch.lengths)).any()):
        row = int(wrong.int().argmax())
        length = int(batch.lengths[row])
        raise SurgeryError(f"The position of {what} in prompt {row} is {int(given[row])}, and it has {length} tokens.")
    return column


def components(anatomy: Anatomy, names: Iterable[str | Site] | str) -> list[Site]:
    """The sites of names, one a layer where no layer is named. Raises `SurgeryError` for what is no component."""
    found = anatomy.expand(names)
    if wrong := [site for site in found if site.name in UNFIT]:
        raise SurgeryError(f"'{wrong[0]}' can't be a component.",
                           hint="Components are heads (z, q, k, v), neurons (mlp_post) and parts of the stream "
                           "(resid_pre, attn_out, mlp_out, ...) in layers.")  # fmt: skip
    return found
