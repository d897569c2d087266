"""Inside the claim about planted directions."""

import pytest
import torch

EXPERIMENT = "planted_directions"


def test_nested_directions_are_on_with_their_own(experiment):
    world = experiment.Nested(seed=3)
    rows, sizes = world.rows(20_000, 1)
    first, second = (sizes > 0).view(-1, 2, world.n // 2).double().unbind(1)
    assert not bool(((second > 0) & (first == 0)).any()), "never without"
    rates = first.mean(0)
    assert rates[0] == pytest.approx(world.rate, abs=0.01) and rates[-1] == pytest.approx(world.rare, abs=0.004)
    assert float(second.sum() / first.sum()) == pytest.approx(world.share, abs=0.02)
    left = rows - sizes @ world.directions
    assert float(left.std()) == pytest.approx(world.noise, rel=0.02)
    assert torch.equal(rows, experiment.Nested(seed=3).rows(20_000, 1)[0])


def test_gaussian_rows_have_the_same_mean_and_covariance_and_no_directions(experiment):
    world = experiment.WORLDS["even"](seed=1)
    stream = experiment.gaussian(world)
    found = torch.cat([next(stream)["x"] for _ in range(120)])
    rows = world.rows(len(found), 5)[0]
    assert float((found.T.cov() - rows.T.cov()).norm() / rows.T.cov().norm()) < 0.12
    assert float((found.mean(0) - rows.mean(0)).norm() / rows.mean(0).norm()) < 0.1

    def kurtosis(x):
        along = (x - x.mean(0)) @ world.directions.T
        return float((along.pow(4).mean(0) / along.square().mean(0) ** 2).mean())

    assert kurtosis(found) == pytest.approx(3, abs=0.1) and kurtosis(rows) > 3.5


@pytest.mark.parametrize("mean, low, verdict", [
    (0.95, 0.5, "held"), (0.89, 0.5, "in part"), (1.0, 0.0, "did not hold"), (1.0, None, "did not hold"),
])  # fmt: skip
def test_verdicts_follow_the_rule(experiment, mean, low, verdict):
    over = [{"low": 0.6}, {"low": low}, {"low": 0.7}]
    assert experiment.verdict({"mean": mean}, over) == verdict
