"""Methods that act on the singular values of a matrix of differences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.weights.methods.linear import weighted_sum
from surgery.weights.methods.registry import PerInput, method, per_input
from surgery.weights.sparsify import fraction


@method("iso_c", needs_base=True, unit="tensor", paper="arXiv:2502.04959")
def iso_c(tuned: Sequence[Tensor], base: Tensor, *, weight: PerInput[float] = 1.0, scale: float = 1.0) -> Tensor:
    """Sum the task vectors and make all singular values of the sum equal to their mean (Iso-C).

    B + scale * mean(s) * U V^T, so that no task's directions are drowned. Tensors that are not matrices get the
    (weighted) average difference. Directions that nothing changed (s = 0, as in differences of low rank) are
    arbitrary and stay unchanged. Marczak et al. 2025, arXiv:2502.04959, algorithm 1.
    """
    weights = per_input(weight, len(tuned), "weight")
    total = weighted_sum([f - base for f in tuned], weights)
    if total.ndim != 2 or not total.any():
        return base + scale * (total / len(tuned))
    u, s, vt = _directions(total, total.norm(), min(total.shape))
    return base + scale * (s.sum() / min(total.shape)) * (u @ vt)


@method("iso_cts", needs_base=True, unit="tensor", paper="arXiv:2502.04959")
def iso_cts(
    tuned: Sequence[Tensor],
    base: Tensor,
    *,
    weight: PerInput[float] = 1.0,
    common: float = 0.8,
    scale: float = 1.0,
) -> Tensor:
    """Iso-C that gives the weakest directions of the sum to directions of single tasks (Iso-CTS).

    The strongest share `common` of the sum's singular directions stays; the rest is divided among the tasks, each
    with the strongest directions of its difference outside that common space; both sides are then orthogonalised and
    all singular values set to their mean. Marczak et al. 2025, arXiv:2502.04959, algorithm 2.
    """
    deltas = [w * (f - base) for f, w in zip(tuned, per_input(weight, len(tuned), "weight"), strict=True)]
    total = weighted_sum(deltas, [1.0] * len(deltas))
    if total.ndim != 2 or not total.any():
        return base + scale * (total / len(deltas))
    rank = min(total.shape)
    # Every task gets the same number of directions; what does not divide stays in the common space.
    own = round((rank - int(rank * fraction(common, "common"))) / len(deltas))
    own = min(own, rank // len(deltas))
    shared = rank - own * len(deltas)
    spaces = [_directions(total, total.norm(), shared)]
    u = spaces[0][0]
    if own:
        spaces += [_directions(d - u @ (u.T @ d), d.norm(), own) for d in deltas]
    left, values, right = zip(*spaces, strict=True)
    u, vt = _nearest_orthogonal(torch.cat(left, dim=1)), _nearest_orthogonal(torch.cat(right))
    return base + scale * (torch.cat(values).sum() / rank) * (u @ vt)


def _directions(a: Tensor, size: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `most` strongest singular directions (U, s, V^T) of `a`, without those that are rounding beside `size`."""
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    keep = min(most, int((s > size * max(a.shape) * torch.finfo(a.dtype).eps).sum()))
    return u[:, :keep], s[:keep], vt[:keep]


def _nearest_orthogonal(a: Tensor) -> Tensor:
    """The matrix with orthonormal columns (or rows) nearest to `a`: its polar factor, U V^T of its SVD."""
    u, _, vt = torch.linalg.svd(a, full_matrices=False)
    return u @ vt
