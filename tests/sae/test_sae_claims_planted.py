"""The claim about planted directions runs from end to end; the table of claims quotes its results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
RESULTS = EXPERIMENTS / "results"
CLAIMS = ["planted_directions"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def script(monkeypatch):
    """The script as a module; it and its neighbours are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    modules = set(sys.modules)
    yield __import__(CLAIMS[0])
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(EXPERIMENTS)):
            del sys.modules[name]


def test_the_readme_quotes_the_stored_results(script):
    readme = (EXPERIMENTS / "README.md").read_text(encoding="utf-8").splitlines()
    report = json.loads((RESULTS / f"{CLAIMS[0]}.json").read_text())
    lines = [line for line in script.markdown(report["summary"]).splitlines() if line]
    assert len(lines) >= 17
    assert [line for line in lines if line not in readme] == []
    assert any(f"results/{CLAIMS[0]}.png" in line for line in readme)
    assert any(f"experiments/{CLAIMS[0]}.py" in line for line in readme)
    assert (RESULTS / f"{CLAIMS[0]}.json").stat().st_size < 100_000
    assert (RESULTS / f"{CLAIMS[0]}.png").stat().st_size < 100_000
    script.check(report)


def test_it_runs(script, tmp_path):
    command = [sys.executable, str(EXPERIMENTS / f"{CLAIMS[0]}.py"), "--fast", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SURGERY_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / f"{CLAIMS[0]}.json").read_text())
    stored = json.loads((RESULTS / f"{CLAIMS[0]}.json").read_text())
    assert report.keys() == stored.keys()
    assert script.markdown(report["summary"]) in run.stdout
    assert (tmp_path / f"{CLAIMS[0]}.png").read_bytes().startswith(b"\x89PNG")
    script.check(report)


def test_nested_directions_are_on_with_their_own(script):
    world = script.Nested(seed=3)
    rows, sizes = world.rows(20_000, 1)
    first, second = (sizes > 0).view(-1, 2, world.n // 2).double().unbind(1)
    assert not bool(((second > 0) & (first == 0)).any()), "never without"
    rates = first.mean(0)
    assert rates[0] == pytest.approx(world.rate, abs=0.01) and rates[-1] == pytest.approx(world.rare, abs=0.004)
    assert float(second.sum() / first.sum()) == pytest.approx(world.share, abs=0.02)
    left = rows - sizes @ world.directions
    assert float(left.std()) == pytest.approx(world.noise, rel=0.02)
    assert torch.equal(rows, script.Nested(seed=3).rows(20_000, 1)[0])


def test_gaussian_rows_have_the_same_mean_and_covariance_and_no_directions(script):
    world = script.WORLDS["even"](seed=1)
    stream = script.gaussian(world)
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
def test_verdicts_follow_the_rule(script, mean, low, verdict):
    over = [{"low": 0.6}, {"low": low}, {"low": 0.7}]
    assert script.verdict({"mean": mean}, over) == verdict
