"""Sums of sparsified task vectors, with or without a vote on each element's sign.

All of them are s_i = sparsify(F_i - B) followed by `merge`, and differ in what `sparsify` keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.weights import sparsify
from surgery.weights.methods.linear import Normalize, divisor, weighted_sum
from surgery.weights.methods.registry import Hidden, PerInput, method, per_input
from surgery.weights.sparsify import Selection, Ties, apply_selection

Election = Literal["total", "frequency", "unweighted"]
"""Whose sign wins an element: that of the weighted sum, of the count of signs, or of the unweighted sum."""
Rescale = Literal["expectation", "l1", "none"]
"""How kept elements make up for dropped ones: 1 / (keep probability), the tensor's old L1 norm, or not at all."""
Norm = Literal["none", "l1"]
"""The same where what is kept is not random."""


def elect(votes: Sequence[Tensor], election: Election) -> Tensor:
    """The elected sign (+1 or -1) of each element; an exact tie elects +1. TIES, arXiv:2306.01708, equation 1."""
    votes = [torch.sign(v) if election == "frequency" else v for v in votes]
    return torch.where(weighted_sum(votes) >= 0, 1.0, -1.0)


def merge(
    base: Tensor,
    sparse: Sequence[Tensor],
    weight: PerInput[float],
    *,
    scale: float,
    normalize: Normalize,
    election: Election | None = None,
) -> Tensor:
    """B + scale * M, where M sums w_i s_i over all models, or over those whose sign agrees with the elected one.

    `normalize` divides each element by the weights (0 counts as 1) or by the number of the models that took part.
    Zeros have no sign: they agree with nobody. A negative weight turns a model's vote round.
    """
    weights = per_input(weight, len(sparse), "weight")
    if election is None:
        return base + scale * (weighted_sum(sparse, weights) / divisor(weights, normalize))
    weighted = [w * s for w, s in zip(weights, sparse, strict=True)]
    votes = sparse if election == "unweighted" else weighted
    sign = elect(votes, election)
    agree = [(torch.sign(v) == sign).to(base.dtype) for v in votes]
    total = weighted_sum([m * x for m, x in zip(agree, weighted, strict=True)])
    if normalize != "none":
        share = weighted_sum(agree, weights if normalize == "weights" else None)
        total = total / torch.where(share == 0, 1.0, share)
    return base + scale * total


def rescaled(d: Tensor, mask: Tensor, keep: Tensor | float, rescale: Rescale) -> Tensor:
    """`d` where the mask is set, rescaled: divided by its keep probability, or to the L1 norm of all of `d`."""
    kept = d * mask
    if rescale == "expectation":
        return kept / (keep.clamp_min(torch.finfo(keep.dtype).tiny) if isinstance(keep, Tensor) else keep or 1.0)
    if rescale == "l1":
        before, after = d.abs().sum(), kept.abs().sum()
        return kept * (before / after) if after > 0 else kept
    return kept


@method("ties", needs_base=True, unit="tensor", paper="arXiv:2306.01708")
def ties(
    tuned: Sequence[Tensor],
    base: Tensor,
    *,
    weight: PerInput[float] = 1.0,
    density: PerInput[float] = 0.2,
    scale: float = 1.0,
    normalize: Normalize = "weights",
    election: Election = "total",
    rescale: Norm = "none",
    scope: Literal["tensor", "model"] = "tensor",
    ties: Ties = "index",
    selections: Hidden[Sequence[Selection] | None] = None,
    keys: Hidden[PerInput[int] | None] = None,
) -> Tensor:
    """Trim, elect signs, and average what agrees (TIES).

    Keeps the `density` of each task vector that is largest in magnitude, within the tensor or (`scope="model"`, as
    the authors do; the engine passes the `selections`) within the model. Equal weights with "weights" are the paper's
    mean. mergekit: the defaults with its own density of 1; PEFT: election="unweighted", normalize="count".
    Yadav et al. 2023, arXiv:2306.01708.
    """
    deltas = [f - base for f in tuned]
    if scope == "model":
        if selections is None:
            raise SurgeryError("scope='model' needs the selection over the whole model.", hint="See select_model.")
        masks = [apply_selection(d, s, ties) for d, s in zip(deltas, selections, strict=True)]
    else:
        shares, streams = per_input(density, len(deltas), "density"), per_input(keys, len(deltas), "keys")
        masks = [sparsify.magnitude(d, p, ties, k) for d, p, k in zip(deltas, shares, streams, strict=True)]
    sparse = [rescaled(d, m, 1.0, rescale) for d, m in zip(deltas, masks, strict=True)]
    return merge(base, sparse, weight, scale=scale, normalize=normalize, election=election)


@method("dare_linear", needs_base=True, unit="element", unit_if={("rescale", "l1"): "tensor"}, paper="arXiv:2311.03099")
def dare_linear(
    tuned: Sequence[Tensor],
    base: Tensor,
    *,
    weight: PerInput[float] = 1.0,
    density: PerInput[float] = 0.1,
    scale: float = 1.0,
    normalize: Normalize = "none",
    rescale: Rescale = "expectation",
    keys: Hidden[PerInput[int]],
    offset: Hidden[int] = 0,
) -> Tensor:
    """Drop differences at random and rescale the rest (DARE), then add: B + scale * sum w_i m_i d_i / density.

    `offset` is the flat index of the first element when called on a slice. mergekit: rescale="l1".
    Yu et al. 2024, arXiv:2311.03099, who drop 90 % and more of fine-tunings with small differences.
    """
    sparse = _dropped(tuned, base, density, rescale, keys, offset)
    return merge(base, sparse, weight, scale=scale, normalize=normalize)


@method("dare_ties", needs_base=True, unit="element", unit_if={("rescale", "l1"): "tensor"}, paper="arXiv:2311.03099")
def dare_ties(
    tuned: Sequence[Tensor],
    base: Tensor,
    *,
    weight: PerInput[float] = 1.0,
    density: PerInput[float] = 0.1,
    scale: float = 1.0,
    normalize: Normalize = "weights",
    election: Election = "total",
    rescale: Rescale = "expectation",
    keys: Hidden[PerInput[int]],
    offset: Hidden[int] = 0,
) -> Tensor:
    """DARE's random dropping in place of TIES' trimming, then its sign election and mean of what agrees.

    mergekit: rescale="l1", normalize="none". Yu et al. 2024, arXiv:2311.03099, section 3.2.
    """
    sparse = _dropped(tuned, base, density, rescale, keys, offset)
    return merge(base, sparse, weight, scale=scale, normalize=normalize, election=election)


@method("breadcrumbs", needs_base=True, unit="tensor", unit_if={("scope", "row"): "row"}, paper="arXiv:2312.06795")
def breadcrumbs(
    tuned: Sequence[Tensor],
    base: Tensor,
    *,
    weight: PerInput[float] = 0.2,
    density: PerInput[float] = 0.15,
    top: PerInput[float] = 0.006,
    bottom: PerInput[float | None] = None,
    scale: float = 1.0,
    normalize: Normalize = "none",
    rescale: Norm = "none",
    scope: Literal["tensor", "row"] = "tensor",
    ties: Ties = "index",
    keys: Hidden[PerInput[int] | None] = None,
) -> Tensor:
    """Sum of task vectors without their outliers and without their dust (Model Breadcrumbs).

    B + scale * sum w_i m_i d_i. Of each tensor, or each row as in the authors' code, the share `top` of largest
    magnitudes is removed, then the share `density` of all is kept of what is left, largest first; `bottom`, the share
    of smallest removed, replaces `density` when given. The weight is the paper's alpha, `top` is mergekit's gamma.
    Davari & Belilovsky 2023, arXiv:2312.06795.
    """
    sparse = _breadcrumbs(tuned, base, density, top, bottom, rescale, scope, ties, keys)
    return merge(base, sparse, weight, scale=scale, normalize=normalize)


@method("breadcrumbs_ties", needs_base=True, unit="tensor", unit_if={("scope", "row"): "row"}, paper="arXiv:2312.06795")
def breadcrumbs_ties(
    tuned: Sequence[Tensor],
    base: Tensor,
    *,
    weight: PerInput[float] = 1.0,
    density: PerInput[float] = 0.15,
    top: PerInput[float] = 0.006,
    bottom: PerInput[float | None] = None,
    scale: float = 1.0,
    normalize: Normalize = "weights",
    election: Election = "total",
    rescale: Norm = "none",
    scope: Literal["tensor", "row"] = "tensor",
    ties: Ties = "index",
    keys: Hidden[PerInput[int] | None] = None,
) -> Tensor:
    """Breadcrumbs' band of magnitudes, then TIES' sign election and mean of what agrees.

    Of mergekit, where normalize="none"; the two papers are arXiv:2312.06795 and arXiv:2306.01708.
    """
    sparse = _breadcrumbs(tuned, base, density, top, bottom, rescale, scope, ties, keys)
    return merge(base, sparse, weight, scale=scale, normalize=normalize, election=election)


@method("della_linear", needs_base=True, unit="row", unit_if={("rescale", "l1"): "tensor"}, paper="arXiv:2406.11617")
def della_linear(
    tuned: Sequence[Tensor],
    base: Tensor,
    *,
    weight: PerInput[float] = 1.0,
    density: PerInput[float] = 0.5,
    epsilon: PerInput[float] = 0.15,
    scale: float = 1.0,
    normalize: Normalize = "none",
    rescale: Rescale = "expectation",
    keys: Hidden[PerInput[int]],
    offset: Hidden[int] = 0,
) -> Tensor:
    """Drop differences at random, small ones of a row more often than large ones, and rescale; then add.

    See `della`. mergekit: rescale="l1".
    """
    sparse = _pruned(tuned, base, density, epsilon, rescale, keys, offset)
    return merge(base, sparse, weight, scale=scale, normalize=normalize)


@method("della", needs_base=True, unit="row", unit_if={("rescale", "l1"): "tensor"}, paper="arXiv:2406.11617")
def della(
    tuned: Sequence[Tensor],
    base: Tensor,
    *,
    weight: PerInput[float] = 1.0,
    density: PerInput[float] = 0.5,
    epsilon: PerInput[float] = 0.15,
    scale: float = 1.0,
    normalize: Normalize = "weights",
    election: Election = "total",
    rescale: Rescale = "expectation",
    keys: Hidden[PerInput[int]],
    offset: Hidden[int] = 0,
) -> Tensor:
    """Drop by rank of magnitude (MagPrune), elect signs, average what agrees (DELLA).

    An element is kept with a probability between density - epsilon and density + epsilon, by its rank in its row, and
    divided by that probability. `epsilon` is the half width, as in the authors' code (the paper's is the full one).
    mergekit: rescale="l1". Deep et al. 2024, arXiv:2406.11617.
    """
    sparse = _pruned(tuned, base, density, epsilon, rescale, keys, offset)
    return merge(base, sparse, weight, scale=scale, normalize=normalize, election=election)


def _dropped(
    tuned: Sequence[Tensor],
    base: Tensor,
    density: PerInput[float],
    rescale: Rescale,
    keys: PerInput[int],
    offset: int,
) -> list[Tensor]:
    shares, streams = per_input(density, len(tuned), "density"), per_input(keys, len(tuned), "keys")
    masks = [sparsify.bernoulli(p, base.shape, k, offset) for p, k in zip(shares, streams, strict=True)]
    return [rescaled(f - base, m, p, rescale) for f, m, p in zip(tuned, masks, shares, strict=True)]


def _breadcrumbs(
    tuned: Sequence[Tensor],
    base: Tensor,
    density: PerInput[float],
    top: PerInput[float],
    bottom: PerInput[float | None],
    rescale: Norm,
    scope: Literal["tensor", "row"],
    ties: Ties,
    keys: PerInput[int] | None,
) -> list[Tensor]:
    sparse = []
    columns = [per_input(v, len(tuned), n) for v, n in ((density, "density"), (top, "top"), (bottom, "bottom"))]
    for f, p, g, b, k in zip(tuned, *columns, per_input(keys, len(tuned), "keys"), strict=True):
        d = f - base
        mask = sparsify.band(d, p, g, bottom=b, scope=scope, ties=ties, key=k)
        sparse.append(rescaled(d, mask, 1.0, rescale))
    return sparse


def _pruned(
    tuned: Sequence[Tensor],
    base: Tensor,
    density: PerInput[float],
    epsilon: PerInput[float],
    rescale: Rescale,
    keys: PerInput[int],
    offset: int,
) -> list[Tensor]:
    sparse = []
    columns = [per_input(v, len(tuned), n) for v, n in ((density, "density"), (epsilon, "epsilon"))]
    for f, p, e, k in zip(tuned, *columns, per_input(keys, len(tuned), "keys"), strict=True):
        d = f - base
        keep = sparsify.row_rank(d, p, e)
        mask = sparsify.bernoulli(keep, d.shape, k, offset)
        sparse.append(rescaled(d, mask, keep, rescale))
    return sparse
