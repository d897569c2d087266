"""Inside the claim about Transfer Q*."""

import math
from itertools import product

import numpy as np
import pytest

EXPERIMENT = "transfer_q"


def test_rewards(experiment):
    assert experiment.exact("1+2=3;#3", "3") == 1 and experiment.exact("#31", "3") == 0
    assert experiment.share("#abd", "abcd") == 0.5 and experiment.share("#abcd", "abcd") == 1
    assert experiment.share("abcd", "abcd") == 0 and experiment.share("#abcdd", "abcd") == 0.8


@pytest.mark.parametrize("n", [1, 2, 5])
def test_best_of_n_by_counting(n, experiment):
    """Against every way to draw n of the samples with replacement; of a reward 0 or 1 the KL is the least of all."""
    values = [0.0, 0.25, 0.25, 1.0, 0.0]
    best = [max(drawn) for drawn in product(values, repeat=n)]
    found = experiment.best_of([values], n)
    assert found["reward"] == pytest.approx(np.mean(best), abs=1e-12)
    kl = 0.0
    for level in set(values):
        p, b = np.mean(np.equal(values, level)), np.mean(np.equal(best, level))
        kl += b * math.log(b / p) if b else 0.0
    assert found["kl"] == pytest.approx(kl, abs=1e-12)
    assert found["kl"] <= found["bound"] + 1e-12 == pytest.approx(math.log(n) - (n - 1) / n)
    a, p = 1 - 0.75**n, 0.25  # whoever is right this often has at least the KL between the two coins
    least = a * math.log(a / p) + (1 - a) * math.log((1 - a) / (1 - p))
    assert experiment.best_of([[0.0, 0.0, 1.0, 0.0]], n)["kl"] == pytest.approx(least, abs=1e-12)
    assert experiment.best_of([[1.0, 1.0]], n)["kl"] == 0, "there is nothing to choose"


@pytest.mark.parametrize("temperature", [3.0, 0.4])
def test_no_policy_is_above_the_frontier(temperature, experiment):
    """Every reward minus temperature times KL is at most the tilted policy's, and small changes of it lose."""
    values = [0.0, 0.0, 0.25, 0.5, 1.0]
    found = experiment.tilted([values], temperature)
    best, rng = found["reward"] - temperature * found["kl"], np.random.default_rng(0)
    for scale in (0.01, 0.1, 1.0):
        for _ in range(20):
            b = np.exp(np.array(values) / temperature + scale * rng.standard_normal(5))
            b /= b.sum()
            assert b @ values - temperature * (b @ np.log(5 * b)) < best + 1e-12
    assert experiment.tilted([values, values], 1e-3) == pytest.approx({"kl": math.log(5), "reward": 1.0})


def test_rewards_at_equal_kl(experiment):
    """Between two points on a line; beyond the last one only where that has the reward already."""
    found = {
        "Transfer Q*": [{"kl": 0.5, "reward": 0.6}, {"kl": 3.0, "reward": 0.7}, {"kl": 3.0, "reward": 0.95}],
        "controlled": [{"kl": 1.0, "reward": 0.4}, {"kl": 4.0, "reward": 0.7}],
        "best of n": [
            {"kl": 0.0, "bound": 0.0, "reward": 0.2},
            {"kl": 1.0, "bound": 2.0, "reward": 0.6},
            {"kl": 2.0, "bound": 4.0, "reward": 0.9},
        ],
        "frontier": [{"kl": 1.0, "reward": 0.8}, {"kl": 4.0, "reward": 1.0}],
    }
    differences = experiment.at_equal_kl(found)
    assert differences["best of n"] == [pytest.approx(0.2), pytest.approx(-0.2), None]
    assert differences["bound"] == [pytest.approx(0.3), pytest.approx(-0.05), pytest.approx(0.2)]
    assert differences["controlled"] == [pytest.approx(0.3), pytest.approx(0.1), pytest.approx(0.35)]
    assert differences["frontier"] == [pytest.approx(0.1), pytest.approx(-7 / 30), pytest.approx(1 / 60)]


def test_verdicts(experiment):
    def seed(shift):
        line = [{"alpha": 2.0**-i, "kl": 0.5 + i, "reward": 0.4 + 0.1 * i, "tokens": 9.0} for i in range(5)]
        best = [
            {"n": n, "kl": kl, "bound": kl, "tokens": 1.0, "reward": 0.2 + 0.1 * kl} for n, kl in ((1, 0.0), (2, 9.0))
        ]
        ours = [point | {"reward": point["reward"] + shift} for point in line]
        return {"Transfer Q*": ours, "controlled": line, "best of n": best, "frontier": best}

    above, near = [seed(0.1 + 0.01 * i) for i in range(3)], [seed(0.1 * (-1) ** i) for i in range(4)]
    summary = experiment.summarised({"one": above, "other": near})
    one, other = (summary["comparisons"][name] for name in ("one", "other"))
    assert one["verdict over controlled"] == "held" and one["over"]["controlled"]["mean"] == pytest.approx(0.11)
    assert other["verdict over controlled"] == "no clear difference"
    assert summary["verdict over controlled"] == "in part"
    assert experiment.summarised({"one": above})["verdict over controlled"] == "held"
    assert experiment.summarised({"other": near})["verdict over controlled"] == "did not hold"
