"""From the sums of a sweep to quantities with a meaning: the equations, and nothing else.

`s` holds the fields of `analysis.sweep.empty_sums` with the groups on axis 0; results keep that axis, then the vectors.
"""

from __future__ import annotations

import numpy as np


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where b is 0."""
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=np.asarray(b) != 0)


def norms(gram: np.ndarray) -> np.ndarray:
    """The lengths that a Gram matrix holds on its diagonal."""
    return np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))


def cosine(gram: np.ndarray) -> np.ndarray:
    """Cosines of a Gram matrix, NaN where a vector is zero."""
    lengths = norms(gram)
    return np.clip(divide(gram, lengths[..., :, None] * lengths[..., None, :]), -1, 1)


def vectors(s: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is said of each vector, (groups, K)."""
    n, base = s["numel"][:, None], s["base_square"][:, None]
    l2 = norms(s["gram"])
    tuned = np.sqrt(np.maximum(base + 2 * s["base_dot"] + l2**2, 0))
    mean, m2, m3, m4 = s["first"] / n, l2**2 / n, s["third"] / n, s["fourth"] / n
    central4 = m4 - 4 * mean * m3 + 6 * mean**2 * m2 - 3 * mean**4
    return {
        "l1": s["l1"],
        "l2": l2,
        "linf": s["linf"],
        "relative": divide(l2, np.sqrt(base)),
        "base_cosine": np.clip(divide(base + s["base_dot"], np.sqrt(base) * tuned), -1, 1),
        "zeros": 1 - np.diagonal(s["both"], axis1=1, axis2=2) / n,
        "kurtosis": divide(central4, (m2 - mean**2) ** 2),
        "kept_by_trim": divide(np.sqrt(s["trimmed"]), l2),
        "kept_by_election": divide(np.sqrt(s["elected"]), l2),
    }


def pairs(s: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is said of each pair, (groups, K, K)."""
    count = np.diagonal(s["top"], axis1=1, axis2=2)
    return {
        "dot": s["gram"],
        "cosine": cosine(s["gram"]),
        "sign_conflict": divide((s["both"] - s["signs"]) / 2, s["both"]),
        "top_overlap": divide(s["top"], count[:, :, None] + count[:, None, :] - s["top"]),
    }


def family(s: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is said of all vectors together, (groups,)."""
    gram = s["gram"]
    k = gram.shape[1]
    summed = np.sqrt(np.maximum(gram.sum((1, 2)), 0))
    above = np.triu_indices(k, 1)
    c = cosine(gram)[:, above[0], above[1]].mean(1) if k > 1 else np.full(len(gram), np.nan)
    return {
        "numel": s["numel"],
        "any_conflict": s["any_conflict"] / s["numel"],
        "interference": 1 - divide(summed, norms(gram).sum(1)),
        "mean_cosine": c,
        "model_stock_t": divide(k * c, 1 + (k - 1) * c),  # arXiv:2403.19522, equation 7
        "rounding_loss": divide(np.sqrt(s["rounding"]), summed / k),
    }
