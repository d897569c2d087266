"""Is one arm better than another, over items and seeds at once? A paired two-level bootstrap.

An experiment gives each arm (GRPO and SFT, say) the same items under the same seeds. Items are a sample of the task and
seeds a sample of what training may yield; an interval that resamples only one of them is too sure of itself.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from analysis.results import Result
from surgery.errors import SurgeryError

T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""The 97.5 % quantile of Student's t for 1, 2, ... 10 degrees of freedom."""
Z975 = 1.959963984540054


@dataclass(frozen=True)
class Comparison:
    """The mean difference of two arms with its 95 % interval and two-sided p-value."""

    difference: float
    low: float
    high: float
    p_value: float
    n: int
    """Number of items."""
    seeds: int

    def __str__(self) -> str:
        over = f"n={self.n}" + (f", {self.seeds} seeds" if self.seeds > 1 else "")
        return f"{self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}] p={self.p_value:.2g} {over}"

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON."""
        return asdict(self)


def compare(ours: Result, theirs: Result, *, resamples: int = 4000, seed: int = 0) -> Comparison:
    """Mean of `ours - theirs`; results are (examples,) or (examples, seed), with the same labels in both.

    Each resample draws seeds, then items, with replacement; one draw of items serves all seeds, which share them. A
    plain percentile interval is too narrow for few seeds: deviations from the mean are widened level by level, by
    sqrt(n / (n-1)) * t(n-1) / z, to agree with Student's t where one level makes all the noise (the "expanded"
    interval of Hesterberg 2014, arXiv:1411.5279). p is twice the share of resamples on the other side of zero, the
    observed one counted, and at least 2^(1-n), the least that a sign test of n items can tell. Raises `SurgeryError`
    when the two can't be paired.
    """
    if ours.axes != theirs.axes:
        raise SurgeryError(
            f"Results '{ours.name}' and '{theirs.name}' have different examples or seeds: they can't be paired."
        )
    if ours.values.ndim > 2:
        raise SurgeryError(f"Result '{ours.name}' has axes {', '.join(ours.axes)}: expected examples and seeds.")
    if not len(ours):
        raise SurgeryError(f"Result '{ours.name}' has no examples to compare.")
    grid = (ours.values - theirs.values).reshape(len(ours), -1)
    items, seeds = grid.shape
    rng = np.random.default_rng(seed)
    of_seeds = _weights(rng, seeds, resamples)
    of_items = _weights(rng, items, resamples)
    means = np.einsum("rs,rs->r", of_items @ grid, of_seeds)
    low, high = np.quantile(means, (0.025, 0.975))
    hair = 1e-12 * np.abs(grid).max()  # equal means that were added up in another order count as equal
    beyond = min((means <= hair).sum(), (means >= -hair).sum())
    p_value = min(1.0, max(2 * (1 + beyond) / (1 + resamples), 2.0 ** (1 - items)))
    return Comparison(float(grid.mean()), float(low), float(high), float(p_value), items, seeds)


def _weights(rng: np.random.Generator, n: int, resamples: int) -> np.ndarray:
    """Weights (resamples, n) of a resampled mean, their deviations from 1/n widened for small n."""
    if n == 1:  # nothing is known about the noise of this level
        return np.ones((resamples, 1))
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n
    return 1 / n + np.sqrt(n / (n - 1)) * _t975(n - 1) / Z975 * (drawn - 1 / n)


def _t975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (above the table: Cornish-Fisher to 1/freedom^2, within 3e-3)."""
    if freedom <= len(T975):
        return T975[freedom - 1]
    z = Z975
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
