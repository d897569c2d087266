"""What takes the place of heads that are left out of a circuit: z by layer and by a token's place in its prompt.

| ablation | what a head says instead | which prompts correspond |
|---|---|---|
| "mean" | its mean at the same place over the reference prompts | all have one length |
| "resample" | what it says there in another reference prompt, drawn by the seed, never the prompt's own | drawn ones |
| "counterfactual" | what it says there in the prompt's counterfactual: `reference`, one a prompt | pair by pair |
| "zero" | 0 | |

Places are counted from the first token; of prompts of unequal length one has to say `align="start"` or `align="end"`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from analysis.patching.calls import drawn_others
from surgery.activations.passes import run
from surgery.anatomy import anatomy_of
from surgery.errors import SurgeryError
from surgery.models import Batch

Ablation = Literal["mean", "resample", "counterfactual", "zero"]
Align = Literal["start", "end"]


@dataclass(frozen=True)
class Replaced:
    """For some prompts z of every layer by places, (1 or batch, place, head, d_head).

    Raises `SurgeryError` when a prompt has a token at a place that no reference prompt has.
    """

    z: Sequence[Tensor]
    reach: Tensor
    """(1 or batch,) how many places there are."""
    lengths: Tensor
    """(batch,) of the prompts."""
    from_end: bool
    first: int
    """The number of the first of these prompts."""

    def __post_init__(self) -> None:
        if bool((long := self.lengths > self.reach).any()):
            row = int(long.int().argmax())
            reach = int(self.reach.expand(len(long))[row])
            raise SurgeryError(f"Prompt {self.first + row} has {int(self.lengths[row])} tokens, and what stands in for "
                               f"it has {reach}.", hint="Give reference prompts that are as long.")  # fmt: skip

    def at(self, layer: int, columns: Tensor) -> Tensor:
        """(1 or batch, count, head, d_head) at columns (batch, count); padding gets anything."""
        value = self.z[layer]
        place = self.lengths[:, None] - 1 - columns if self.from_end else columns
        place = place.clamp(0, value.shape[1] - 1)
        rows = torch.arange(len(place), device=place.device)[:, None]
        return value[rows % len(value), place]


def reference_of(own: Batch, others: Batch | None, ablation: Ablation, align: Align | None, seed: int) -> Batch:
    """The prompts that heads' replacements are taken from; drawn ones are one a prompt.

    Raises `SurgeryError` for an unknown ablation, and for prompts whose places do not correspond.
    """
    if ablation not in ("mean", "resample", "counterfactual", "zero"):
        raise SurgeryError(f"ablation={ablation!r}: expected 'mean', 'resample', 'counterfactual' or 'zero'.")
    if align not in (None, "start", "end"):
        raise SurgeryError(f"align={align!r}: expected 'start', 'end' or None.")
    reference = own if others is None else others
    if ablation == "counterfactual" and (others is None or len(others) != len(own)):
        raise SurgeryError(f"Counterfactuals come one a prompt: there are {len(own)} prompts and "
                           f"{0 if others is None else len(others)} of them.",
                           hint="Pass them as reference=, in the order of the prompts.")  # fmt: skip
    if ablation == "resample":
        reference = reference.select(drawn_others(len(own), len(reference), others is None, seed))
    if ablation != "zero" and align is None:
        _one_length(own, reference, pairs=ablation != "mean")
    return reference


def replacement(
    model: Any, ablation: Ablation, own: Batch, reference: Batch, align: Align | None, budget: int
) -> Callable[[slice], Replaced]:
    """What stands in for the heads of some of the prompts. Means are taken once, other prompts run when needed."""
    anatomy, from_end = anatomy_of(model), align == "end"
    if ablation == "zero":
        zero = [torch.zeros(1, 1, anatomy.n_heads, anatomy.d_head, device=model.device)] * anatomy.n_layers
        return lambda rows: Replaced(zero, own.lengths[rows], own.lengths[rows], from_end, rows.start)
    if ablation == "mean":
        z = _mean(model, reference, from_end, budget)
        longest = reference.lengths.max()[None]
        return lambda rows: Replaced(z, longest, own.lengths[rows], from_end, rows.start)

    def drawn(rows: slice) -> Replaced:
        part = reference.select(rows)
        _, seen = run(model, part, ["z"], stop=True)
        z = [_placed(seen[f"z.{layer}"], part, from_end) for layer in range(anatomy.n_layers)]
        return Replaced(z, part.lengths, own.lengths[rows], from_end, rows.start)

    return drawn


def _mean(model: Any, batch: Batch, from_end: bool, budget: int) -> list[Tensor]:
    """The mean of z at each place over the rows that have it, (1, place, head, d_head) by layer."""
    anatomy, places = anatomy_of(model), torch.arange(batch.ids.shape[1], device=batch.ids.device)
    each = 4 * anatomy.n_layers * len(places) * anatomy.n_heads * anatomy.d_head
    size, total = max(1, int(budget / 2 / each)), [torch.zeros((), device=model.device)] * anatomy.n_layers
    for begin in range(0, len(batch), size):
        part = batch.select(slice(begin, begin + size))
        _, seen = run(model, part, ["z"], stop=True)
        real = (places < part.lengths[:, None])[..., None, None]
        for layer in range(anatomy.n_layers):
            z = _placed(seen[f"z.{layer}"], part, from_end).float()
            total[layer] = total[layer] + torch.where(real, z, 0.0).sum(0)
    count = (places < batch.lengths[:, None]).sum(0).clamp(min=1)[:, None, None]
    return [value[None] / count for value in total]


def _placed(value: Tensor, batch: Batch, from_end: bool) -> Tensor:
    """A value (batch, pos, ...) by places: as it is, or counted from each row's last token."""
    if not from_end:
        return value
    places = torch.arange(value.shape[1], device=value.device)
    columns = (batch.lengths[:, None] - 1 - places).clamp(min=0)
    return value[torch.arange(len(value), device=value.device)[:, None], columns]


def _one_length(own: Batch, others: Batch, pairs: bool) -> None:
    """Raises `SurgeryError` where places do not correspond: in all prompts for a mean, else in each pair."""
    theirs = others.lengths if pairs else torch.cat([own.lengths, others.lengths])
    mine = own.lengths if pairs else own.lengths[:1].expand(len(theirs))
    if bool((differ := mine != theirs).any()):
        row = int(differ.int().argmax())
        raise SurgeryError(
            f"Heads are replaced by what they say at the same position, and prompts are {int(mine[row])} and "
            f"{int(theirs[row])} tokens long.",
            hint="Take prompts of one length, or say how they correspond: align='start' or align='end'.",
        )
