"""Singular values of task vectors' matrices, exactly, from the Gram matrix of the shorter side in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from analysis.family import Family

PANEL = 1 << 22
"""Numbers of a matrix held at a time: 32 MB of float64."""

Delta = Callable[[int, int], Tensor]
"""Rows `start:stop` of a difference."""


def singular_values(delta: Delta, rows: int, cols: int) -> np.ndarray:
    """The min(rows, cols) singular values of a matrix that is read in panels of rows, largest first, float64.

    Squares are what is summed, so values below 1e-8 of the largest are noise. Memory: two panels and the Gram matrix;
    cost: 2 rows cols min(rows, cols) operations. A wide matrix of several panels is read once for each of them.
    """
    short = min(rows, cols)
    gram = torch.zeros(short, short, dtype=torch.float64)
    if rows >= cols:
        for _, _, panel in _panels(delta, rows, cols):
            gram.addmm_(panel.T, panel)
    else:
        for start, stop, panel in _panels(delta, rows, cols):
            for first, last, other in _panels(delta, stop, cols):
                gram[start:stop, first:last] = panel @ other.T
    # Only the lower triangle is filled, and only it is read.
    return torch.linalg.eigvalsh(gram).clamp_(min=0).sqrt_().flip(0).numpy()


def _panels(delta: Delta, rows: int, cols: int) -> Iterator[tuple[int, int, Tensor]]:
    step = max(1, PANEL // max(1, cols))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        yield start, stop, delta(start, stop).reshape(stop - start, cols).double()


def spectra(family: Family) -> np.ndarray:
    """Singular values of every vector's matrix: (K, min(rows, cols))."""
    each = range(len(family.vectors))
    return np.stack([singular_values(partial(family.delta, i), family.rows, family.cols) for i in each])


def stable_rank(values: np.ndarray) -> float:
    """||d||_F² / ||d||_2² of singular values; NaN for a zero matrix."""
    return float((values**2).sum() / values[0] ** 2) if values[0] > 0 else float("nan")


def entropy_rank(values: np.ndarray) -> float:
    """exp(H(s / sum s)), the effective rank of Roy and Vetterli (2007); NaN for a zero matrix."""
    if values[0] <= 0:
        return float("nan")
    p = values[values > 0] / values.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def rank_for_energy(values: np.ndarray, energy: float = 0.9) -> int:
    """How many singular values hold the share `energy` of ||d||_F²."""
    squares = np.cumsum(values**2)
    return int(np.searchsorted(squares, energy * squares[-1]) + 1) if squares[-1] > 0 else 0
