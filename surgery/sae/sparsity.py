"""Which latents a row may use: the k largest of each row, k on average over the batch, or all above a threshold.

Each is a `codes.Pick` once its settings are given (`settings`). What they compare are scores: pre-activations, weighed
where the pick has a scale; a latent is used where its score is above 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.sae.codes import Layout, Pick, Pre, blocks

Chosen = list[tuple[Tensor, Layout]]
Kept = tuple[Tensor, Tensor, Tensor]
"""Of some rows: scores and latents, row by row, and how many there are in each row."""
SPARE = 2
"""How many times the wanted number of codes a choice over the batch looks at, as foretold by its first rows."""
FEW = 1 << 19
"""Numbers of the first rows that foretell it."""


@dataclass(frozen=True)
class Dead:
    """A second set of codes, of latents that have not fired for long: the `k` largest of each row, of either sign.

    For the auxiliary loss of arXiv:2406.04093, where dead latents explain what the others leave.
    """

    mask: Tensor
    """(latents,) True for the dead."""
    k: int

    def of(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and latents, (rows, k); at most as many as there are dead ones."""
        numbers = self.mask.nonzero().view(-1)
        values, at = largest(h[:, numbers], min(self.k, len(numbers)))
        return values, numbers[at]


def top_k(pre: Pre, rows: int, latents: int, k: int, dead: Dead | None = None) -> Chosen:
    """The k largest of each row, those of them that are positive (arXiv:2406.04093)."""
    main, aside = [], []
    for part in blocks(rows, latents):
        h = pre(part)
        main.append(largest(h, k))
        if dead is not None:
            aside.append(dead.of(h))
    values, index = _joined(main)
    used = values > 0
    return [(values[used], Layout.of(used, index, latents)), *_beside(aside, latents)]


def batch_top_k(pre: Pre, rows: int, latents: int, k: float, dead: Dead | None = None) -> Chosen:
    """The k x rows largest positive ones of the batch (BatchTopK, arXiv:2412.06410); of equal ones the first.

    At least one of them. The first rows foretell a bound, and only what lies above it is kept; where that was too
    little, all are looked at.
    """
    wanted, parts = max(1, round(k * rows)), blocks(rows, latents)
    first = slice(0, min(parts[0].stop, max(1, FEW // latents)))
    bound = _foretold(pre(first), round(SPARE * k * first.stop))
    kept, aside = _kept(pre, parts, wanted, bound, dead)
    if len(kept[0]) < wanted and float(bound) > 0:
        kept, _ = _kept(pre, parts, wanted, torch.zeros_like(bound))
    values, index, counts = kept
    return [(values, _layout(index, counts, latents)), *_beside(aside, latents)]


def above(pre: Pre, rows: int, latents: int, threshold: Tensor) -> Chosen:
    """All that are positive and above their threshold, () or (latents,): BatchTopK and JumpReLU after training."""
    bound = threshold.clamp(min=0)
    values, index, counts = _joined([_above(pre(part), bound) for part in blocks(rows, latents)])
    return [(values, _layout(index, counts, latents))]


def settings(rule: Callable[..., Chosen], latents: int, *, scale: Tensor | None = None, **chosen: object) -> Pick:
    """A rule as a `Pick`."""
    return Pick(lambda pre, rows: rule(pre, rows, latents, **chosen), scale)


def largest(h: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and places of the k largest of each row, (rows, k), in any order.

    Looked for where they can be: in the k groups of numbers whose maxima are the largest. Groups are about
    sqrt(latents / k) large, so that there are as many groups as numbers in those k of them.
    """
    size = 1 << round(math.log2(h.shape[1] / k) / 2)
    groups = h.shape[1] // size
    if size < 4:
        return h.topk(k, sorted=False)
    whole = size * groups
    best = h[:, :whole].unflatten(1, (size, groups)).amax(1).topk(k, sorted=False).indices
    steps = torch.arange(0, whole, groups, device=h.device)
    rest = torch.arange(whole, h.shape[1], device=h.device)  # fewer than a group: among those that are looked at
    places = torch.cat([(best[:, None] + steps[:, None]).flatten(1), rest.expand(len(h), -1)], 1)
    values, at = h.gather(1, places).topk(k, sorted=False)
    return values, places.gather(1, at)


def _foretold(scores: Tensor, wanted: int) -> Tensor:
    """A bound that about `wanted` of the scores lie above, never below 0."""
    flat = scores.reshape(-1)
    if wanted >= len(flat):
        return flat.new_zeros(())
    return flat.kthvalue(len(flat) - wanted).values.clamp(min=0)


def _above(h: Tensor, bound: Tensor) -> Kept:
    """Of numbers above a bound that is not below 0: the number, its latent, and how many there are in each row."""
    places = (h > bound).view(-1).nonzero().view(-1)
    return h.reshape(-1)[places], places % h.shape[1], torch.bincount(places // h.shape[1], minlength=len(h))


def _kept(
    pre: Pre, parts: Sequence[slice], wanted: int, bound: Tensor, dead: Dead | None = None
) -> tuple[Kept, list[tuple[Tensor, Tensor]]]:
    """Of what is above a bound the largest, as many as are wanted; and, by block, what of the dead is chosen beside.

    The bound goes up where far more than that is above it, so that no more is held.
    """
    found: list[Kept] = []
    aside: list[tuple[Tensor, Tensor]] = []
    for part in parts:
        h = pre(part)
        found.append(_above(h, bound))
        if dead is not None:
            aside.append(dead.of(h))
        if sum(len(values) for values, _, _ in found) > 2 * SPARE * wanted:
            found = [_most(found, wanted)]
            bound = found[0][0].min()
    return _most(found, wanted), aside


def _most(kept: Sequence[Kept], wanted: int) -> Kept:
    """The largest of them, as many as are wanted, all together; of equal ones the first."""
    values, index, counts = _joined(kept)
    if len(values) <= wanted:
        return values, index, counts
    threshold = values.kthvalue(len(values) - wanted + 1).values
    chosen = values > threshold
    equal = (values == threshold).nonzero().view(-1)
    chosen[equal[: wanted - int(chosen.sum())]] = True
    owners = torch.arange(len(counts), device=values.device).repeat_interleave(counts)
    return values[chosen], index[chosen], torch.bincount(owners[chosen], minlength=len(counts))


def _beside(aside: Sequence[tuple[Tensor, Tensor]], latents: int) -> Chosen:
    """What of the dead is chosen, (rows, k) by block: every number is a code."""
    if not aside:
        return []
    values, index = _joined(aside)
    return [(values.reshape(-1), Layout.of(torch.ones_like(index, dtype=torch.bool), index, latents))]


def _joined(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


def _layout(index: Tensor, counts: Tensor, latents: int) -> Layout:
    return Layout(index, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), latents)
