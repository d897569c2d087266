"""The nearest matrix of rank r, exactly, by the Gram matrix of the smaller side: what LIFT looks at.

W' = Q_r Q_r^T W where Q_r are the top r eigenvectors of W W^T (of W^T W on the right when W is tall). Only the top
vectors matter, so squaring the condition number does no harm. A randomised SVD does: of the masks taken from it 23 to
99 % agree with the exact ones on SmolLM2's matrices (ranks 8 to 128, sketches of twice the rank), since the K largest
of W' depend on the small directions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_of_rank(weight: Tensor, rank: int) -> Tensor:
    """(..., m, n) -> (..., m, n) the best approximation of that rank in the Frobenius norm (Eckart-Young)."""
    if weight.dim() > 2:
        return torch.stack([nearest_of_rank(one, rank) for one in weight])
    m, n = weight.shape
    if rank >= min(m, n):
        return weight
    wide = m <= n
    basis = top_eigenvectors(weight @ weight.T if wide else weight.T @ weight, rank)
    return basis @ (basis.T @ weight) if wide else (weight @ basis) @ basis.T


def top_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """(n, n) symmetric -> (n, rank) eigenvectors of the largest eigenvalues."""
    if gram.device.type == "cpu" and 4 * rank <= len(gram):  # LAPACK can stop at the wanted ones
        import scipy.linalg

        at = [len(gram) - rank, len(gram) - 1]
        _, found = scipy.linalg.eigh(gram.numpy(), subset_by_index=at, driver="evr", check_finite=False)
        return torch.from_numpy(found.copy()).to(gram.dtype)
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:]
