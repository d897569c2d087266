"""Intervals and tests by resampling the examples: pure functions on (examples, ...) arrays, one answer a cell.

A cell with a value that is not a number has no interval and no p-value: NaN, without a warning.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

Z95 = 1.959963984540054
CELLS = 4096
"""Cells that are resampled at a time: 2000 resamples of them are 64 MB."""


def wilson(share: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of a share of n (Wilson 1927)."""
    z2 = Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * np.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return middle - half, middle + half


def bootstrap(
    values: np.ndarray, weights: np.ndarray | None = None, *, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile bootstrap interval (Efron 1979) of the mean, or of mean(values) / mean(weights).

    `weights` (examples,) are drawn together with the values, so that the interval holds what both vary.
    """
    n, cells = len(values), values.shape[1:]
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples) / n
    flat = values.reshape(n, -1)
    low, high = np.empty((2, flat.shape[1]))
    with np.errstate(invalid="ignore", divide="ignore"):
        below = 1.0 if weights is None else (counts @ weights)[:, None]
        for part in _parts(flat):
            low[part], high[part] = np.quantile(counts @ flat[:, part] / below, (0.025, 0.975), axis=0)
    return low.reshape(cells)[()], high.reshape(cells)[()]


def sign_flip(values: np.ndarray, *, permutations: int = 10_000, seed: int = 0) -> np.ndarray:
    """Two-sided p-value of "the mean is zero": the share of sign flips whose mean is at least as far from zero.

    Every pattern of signs is tried where there are no more of them than `permutations` (the p-value is exact then),
    else as many are drawn and the observed one is counted with them (Phipson & Smyth 2010).
    """
    n, cells, rng = len(values), values.shape[1:], np.random.default_rng(seed)
    flat = values.reshape(n, -1)
    observed = flat.mean(axis=0)
    # A hair of slack: equal means that were added up in another order count as equal.
    limit = np.abs(observed) * (1 - 1e-9) - 1e-15
    exact = 2**n <= permutations
    tried = 2**n if exact else permutations
    far = np.zeros(flat.shape[1])
    for start in range(0, tried, 1000):  # in blocks, for the memory
        size = min(1000, tried - start)
        if exact:
            bits = np.arange(start, start + size)[:, None] >> np.arange(n) & 1
        else:
            bits = rng.integers(0, 2, size=(size, n), dtype=np.int8)
        signs = (bits * 2.0 - 1.0) / n
        for part in _parts(flat):
            far[part] += (np.abs(signs @ flat[:, part]) >= limit[part]).sum(axis=0)
    p_value = far / tried if exact else (1 + far) / (1 + tried)
    return np.where(np.isfinite(observed), p_value, np.nan).reshape(cells)[()]


def _parts(flat: np.ndarray) -> Iterator[slice]:
    """Columns of a wide array, some thousand at a time."""
    return (slice(start, start + CELLS) for start in range(0, flat.shape[1], CELLS))
