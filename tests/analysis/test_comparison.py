"""Paired bootstrap over items and seeds: right where the answer is known, and neither level forgotten."""

import numpy as np
import pytest

from analysis.comparison import _t975, compare
from analysis.results import Result
from surgery.errors import SurgeryError


def arm(values) -> Result:
    values = np.asarray(values, dtype=float)
    axes = {"example": range(len(values)), "seed": range(values.shape[1])} if values.ndim == 2 else None
    return Result(values, axes, "accuracy") if axes else Result.of(values, name="accuracy")


def test_over_items_alone_it_is_the_t_interval():
    rng = np.random.default_rng(0)
    base = rng.normal(size=200)
    better = base + 0.3 + rng.normal(size=200)
    found, difference = compare(arm(better), arm(base)), better - base
    half = 1.972 * difference.std(ddof=1) / np.sqrt(200)
    assert found.difference == pytest.approx(difference.mean())
    assert (found.low, found.high) == pytest.approx((difference.mean() - half, difference.mean() + half), abs=0.02)
    assert found.p_value < 0.01 and (found.n, found.seeds) == (200, 1)
    assert found == compare(arm(better), arm(base)) != compare(arm(better), arm(base), seed=1)


def test_noise_between_seeds_widens_the_interval():
    rng = np.random.default_rng(1)
    base = rng.normal(size=(100, 5))
    effect = np.array([0.4, -0.3, 0.5, -0.2, 0.3])  # of each seed, on all its items
    found = compare(arm(base + effect), arm(base))
    half = 2.776 * effect.std(ddof=1) / np.sqrt(5)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)
    assert found.low < 0 < found.high and found.p_value > 0.05
    pooled = compare(arm((base + effect).ravel()), arm(base.ravel()))
    assert pooled.high - pooled.low < 0.2 * (found.high - found.low)  # what forgetting the seeds would claim


@pytest.mark.parametrize("level", ["items", "seeds"])
def test_a_true_zero_is_seldom_called_a_difference(level):
    rng, calls = np.random.default_rng(2), 0
    for _ in range(150):
        noise = rng.normal(size=(60, 1) if level == "items" else (1, 4)) + np.zeros((60, 4))
        found = compare(arm(noise), arm(np.zeros((60, 4))), resamples=600)
        calls += found.p_value < 0.05
    assert calls <= 18  # 5 % of 150 is 7.5; the plain interval over 4 seeds calls about 27


def test_equal_arms_have_no_difference():
    found = compare(arm([1, 0, 1]), arm([1, 0, 1]))
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert str(found).startswith("+0.000 [+0.000, +0.000] p=1 n=3")
    assert found.to_dict()["seeds"] == 1


def test_what_can_not_be_paired_is_refused():
    with pytest.raises(SurgeryError, match="can't be paired"):
        compare(arm([1, 0]), arm([1, 0, 1]))
    with pytest.raises(SurgeryError, match="no examples"):
        compare(arm([]), arm([]))
    cube = Result(np.zeros((2, 2, 2)), {"example": [0, 1], "seed": [0, 1], "layer": [0, 1]})
    with pytest.raises(SurgeryError, match="expected examples and seeds"):
        compare(cube, cube)


def test_quantiles_of_student():
    for freedom, right in ((1, 12.706), (10, 2.228), (11, 2.201), (30, 2.042), (1000, 1.962)):
        assert _t975(freedom) == pytest.approx(right, abs=3e-3)
