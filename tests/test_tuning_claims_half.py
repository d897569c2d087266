"""The claims about half fine-tuning run from end to end; the table of claims quotes them."""

import copy
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
CLAIMS = ["half_tuning"]


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
    assert len(lines) >= 15
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
def test_a_reset_half_is_the_base_bit_for_bit(experiment):
    from surgery import zoo
    from surgery.training.run import open_model

    base, _ = open_model(zoo.get("tiny-base"))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for p in tuned.parameters():
            p += 1
    start, end = dict(base.named_parameters()), dict(tuned.named_parameters())
    seen = {}
    for kind, weights in experiment.resets(base, tuned, seed=3):
        assert set(weights) == set(start)
        same = sum(int((weights[n] == start[n]).sum()) for n in start)
        moved = sum(int((weights[n] == end[n]).sum()) for n in start)
        seen.setdefault(kind, []).append((same, moved, sum(p.numel() for p in start.values())))
    assert set(seen) == set(experiment.RESETS)
    for kind, counts in seen.items():
        for same, moved, total in counts:
            if kind == "half of the change":
                assert same == moved == 0
            else:  # q, k, v, o are a third of gate, up, down: halves of the tensors are between these of the numbers
                assert same + moved == total and 0.3 < moved / total < 0.75
