"""Which latents a row may use: the k largest of each row, k on average over the batch, or all above a threshold.

Each is a `codes.Pick` once its settings are given. `scale` (latents,) weighs pre-activations for the choice alone: with
the norms of the decoder's rows it is the choice of a dictionary whose decoder rows have norm 1, without projecting them
(SAELens' rescale_acts_by_decoder_norm; reconstructions are the same, since f / norm times norm is f).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.sae.codes import Layout, Pre, blocks

Chosen = list[tuple[Tensor, Layout]]
SPARE = 2
"""How many times the wanted number of codes a choice over the batch looks at, as foretold by its first rows."""


@dataclass(frozen=True)
class Dead:
    """A second set of codes, of latents that have not fired for long: the `k` largest of each row, of either sign.

    For the auxiliary loss of arXiv:2406.04093, where dead latents explain what the others leave.
    """

    mask: Tensor
    """(latents,) True for the dead."""
    k: int

    def of(self, h: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Values and latents, (rows, k); at most as many as there are dead ones."""
        numbers = self.mask.nonzero().view(-1)
        mine = None if scale is None else scale[numbers]
        values, at = _top(h[:, numbers], min(self.k, len(numbers)), mine)
        return values, numbers[at]


def top_k(pre: Pre, rows: int, latents: int, k: int, scale: Tensor | None = None, dead: Dead | None = None) -> Chosen:
    """The k largest of each row, those of them that are positive (arXiv:2406.04093)."""
    found: list[list[tuple[Tensor, Tensor]]] = []
    for part in blocks(rows, latents):
        h = pre(part)
        found.append([_top(h, k, scale), *([dead.of(h, scale)] if dead is not None else [])])
    pairs = [(torch.cat([v for v, _ in each]), torch.cat([i for _, i in each])) for each in zip(*found, strict=True)]
    values, index = pairs[0]
    used = values > 0
    return [(values[used], Layout.of(used, index, latents)), *(_all(v, i, latents) for v, i in pairs[1:])]


def batch_top_k(
    pre: Pre, rows: int, latents: int, k: float, scale: Tensor | None = None, dead: Dead | None = None
) -> Chosen:
    """The k x rows largest positive ones of the batch (BatchTopK, arXiv:2412.06410); of equal ones the first.

    The first rows foretell a bound, only what lies above it is kept, and where that was too little all are looked at.
    """
    wanted = round(k * rows)
    parts, bound, aside = blocks(rows, latents), None, []
    kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for part in parts:
        h = pre(part)
        if bound is None:
            bound = _foretold(_weighed(h, scale), round(SPARE * k * len(h)))
        kept.append(_above(h, bound, scale))
        if dead is not None:
            aside.append(dead.of(h, scale))
    if sum(len(one[0]) for one in kept) < wanted and float(bound) > 0:  # type: ignore[arg-type]
        kept = [_above(pre(part), torch.zeros_like(bound), scale) for part in parts]  # type: ignore[arg-type]
    values, scores, index, counts = (torch.cat([one[i] for one in kept]) for i in range(4))
    if len(values) > wanted:
        threshold = scores.kthvalue(len(scores) - wanted + 1).values
        chosen = scores > threshold
        equal = (scores == threshold).nonzero().view(-1)
        chosen[equal[: wanted - int(chosen.sum())]] = True
        owners = torch.arange(rows, device=values.device).repeat_interleave(counts)
        values, index, counts = values[chosen], index[chosen], torch.bincount(owners[chosen], minlength=rows)
    found = [(values, _layout(index, counts, latents))]
    if dead is not None:
        found.append(_all(torch.cat([v for v, _ in aside]), torch.cat([i for _, i in aside]), latents))
    return found


def above(pre: Pre, rows: int, latents: int, threshold: Tensor, scale: Tensor | None = None) -> Chosen:
    """All that are positive and above their threshold, () or (latents,): BatchTopK and JumpReLU after training."""
    parts = [_above(pre(part), threshold, scale) for part in blocks(rows, latents)]
    values, _, index, counts = (torch.cat([one[i] for one in parts]) for i in range(4))
    return [(values, _layout(index, counts, latents))]


def settings(rule: Callable[..., Chosen], latents: int, **chosen: object) -> Callable[[Pre, int], Chosen]:
    """A rule as a `Pick`."""
    return lambda pre, rows: rule(pre, rows, latents, **chosen)


def _top(h: Tensor, k: int, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    if scale is None:
        values, index = h.topk(k, sorted=False)
        return values, index
    index = (h * scale).topk(k, sorted=False).indices
    return h.gather(1, index), index


def _weighed(h: Tensor, scale: Tensor | None) -> Tensor:
    return h if scale is None else h * scale


def _foretold(scores: Tensor, wanted: int) -> Tensor:
    """A bound that about `wanted` of the scores lie above, never below 0."""
    flat = scores.reshape(-1)
    return flat.kthvalue(max(1, flat.numel() - wanted)).values.clamp(min=0)


def _above(h: Tensor, bound: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of positive numbers whose score is above: value, score, latent, and how many there are in each row."""
    scores = _weighed(h, scale)
    places = (scores > bound).view(-1).nonzero().view(-1)  # the bound is not below 0, nor are scales
    index = places % h.shape[1]
    values = h.reshape(-1)[places]
    counts = torch.bincount(places // h.shape[1], minlength=len(h))
    return values, values if scale is None else values * scale[index], index, counts


def _all(values: Tensor, index: Tensor, latents: int) -> tuple[Tensor, Layout]:
    """Every number of (rows, k) as a code."""
    return values.reshape(-1), Layout.of(torch.ones_like(index, dtype=torch.bool), index, latents)


def _layout(index: Tensor, counts: Tensor, latents: int) -> Layout:
    return Layout(index, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), latents)
