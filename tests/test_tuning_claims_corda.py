"""The claims about CorDA's two modes run from end to end; the table of claims quotes them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
RESULTS = EXPERIMENTS / "results"
README = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
CLAIMS = ["corda_modes"]


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
    assert len(lines) >= 14
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
    rates = {claim: {arm: max(map(float, by), key=lambda rate, by=by: by[f"{rate:g}"]) for arm, by in arms.items()}
             for claim, arms in report["swept"].items()}  # fmt: skip
    again = experiment.summarised(report["runs"], rates)
    for claim, found in report["summary"].items():
        assert again[claim]["verdict"] == found["verdict"]
        for arm, row in found["arms"].items():  # which are rounded to four decimals
            assert again[claim]["arms"][arm]["rate"] == row["rate"]
            assert again[claim]["arms"][arm]["kept"]["mean"] == pytest.approx(row["kept"]["mean"], abs=2e-4)


@pytest.mark.parametrize("experiment", CLAIMS, indirect=True)
def test_a_claim_needs_its_controls_and_equal_accuracy(experiment):
    up, level = {"mean": 0.1, "low": 0.05, "high": 0.15}, {"mean": 0.1, "low": -0.05, "high": 0.25}
    assert experiment.verdict({"LoRA": up, "identity": up}, 0.0) == "held"
    assert experiment.verdict({"LoRA": up, "identity": level}, 0.0) == "in part"
    assert experiment.verdict({"LoRA": up, "identity": up}, 0.06) == "did not hold"
    assert experiment.verdict({"LoRA": level, "identity": up}, 0.0) == "did not hold"
