"""The claims about SaRA run from end to end; the table of claims quotes them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
RESULTS = EXPERIMENTS / "results"
README = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
CLAIMS = ["sara"]


@pytest.fixture
def experiment(request, monkeypatch):
    """One script as a module; its neighbours are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    modules = set(sys.modules)
    yield __import__(request.param)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(EXPERIMENTS)):
            del sys.modules[name]


@pytest.mark.parametrize("experiment", CLAIMS, indirect=True)
def test_the_readme_quotes_the_stored_results(experiment):
    name = experiment.__name__
    report = json.loads((RESULTS / f"{name}.json").read_text())
    lines = [line for line in experiment.markdown(report["summary"]).splitlines() if line]
    assert len(lines) >= 20
    assert [line for line in lines if line not in README.splitlines()] == []
    assert f"results/{name}.png" in README and f"experiments/{name}.py" in README
    assert (RESULTS / f"{name}.json").stat().st_size < 100_000
    assert (RESULTS / f"{name}.png").stat().st_size < 100_000


@pytest.mark.parametrize("experiment", CLAIMS, indirect=True)
def test_it_runs(experiment, tmp_path):
    name = experiment.__name__
    command = [sys.executable, str(EXPERIMENTS / f"{name}.py"), "--fast", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SURGERY_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / f"{name}.json").read_text())
    stored = json.loads((RESULTS / f"{name}.json").read_text())
    assert report.keys() == stored.keys()
    assert experiment.markdown(report["summary"]) in run.stdout
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    experiment.check(report)


@pytest.mark.parametrize("experiment", CLAIMS, indirect=True)
def test_the_stored_verdicts_follow_from_the_stored_runs(experiment):
    report = json.loads((RESULTS / f"{experiment.__name__}.json").read_text())
    rates = {arm: float(max(by, key=lambda rate, by=by: by[rate])) for arm, by in report["swept"].items()}
    again = experiment.summarised(report["runs"], rates)
    assert again["verdicts"] == report["summary"]["verdicts"]
    assert {a: row["rate"] for a, row in again["arms"].items()} == rates
    assert {a: row["rate"] for a, row in report["summary"]["arms"].items()} == rates


@pytest.mark.parametrize("experiment", CLAIMS, indirect=True)
def test_the_effective_rank_counts_equal_singular_values(experiment):
    assert experiment.effective_rank(torch.eye(7)) == pytest.approx(7)
    assert experiment.effective_rank(torch.ones(4, 6)) == pytest.approx(1, abs=1e-6)
    assert experiment.effective_rank(torch.zeros(3, 3)) == 0
