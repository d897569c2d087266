"""The claims about TuCo, and the real model from the inside, run from end to end; the table of claims quotes them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
RESULTS = EXPERIMENTS / "results"
README = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
CLAIMS = ["tuning_contribution", "smollm2_activations"]


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
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / f"{name}.json").read_text())
    stored = json.loads((RESULTS / f"{name}.json").read_text())
    assert report.keys() == stored.keys()
    assert experiment.markdown(report["summary"]) in run.stdout
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    experiment.check(report)


@pytest.mark.parametrize("experiment", ["smollm2_activations"], indirect=True)
def test_without_the_data_it_says_so(experiment, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("SURGERY_DATA", str(tmp_path))
    with pytest.raises(experiment.SurgeryError, match="tinyshakespeare is missing"):
        experiment.shakespeare(None, [4], Random(0))
    monkeypatch.setattr(experiment, "get", lambda name: tmp_path)
    monkeypatch.setattr(sys, "argv", ["smollm2_activations.py", "--out", str(tmp_path / "out")])
    experiment.main()
    assert capsys.readouterr().out.startswith("Nothing was run: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("experiment", ["smollm2_activations"], indirect=True)
def test_pieces_are_as_long_as_asked(experiment, monkeypatch, tmp_path):
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("to be or not " * 500)
    monkeypatch.setenv("SURGERY_DATA", str(tmp_path))
    words = {"to": 1, "be": 2, "or": 3, "not": 4}
    read = lambda text, add_special_tokens: {"input_ids": [words.get(w, 0) for w in text.split()]}  # noqa: E731
    found = experiment.shakespeare(read, [2, 3, 2], Random(0))
    assert [len(ids) for ids in found] == [2, 3, 2]
    assert all(0 not in ids for ids in found), "a piece begins with a whole word"


@pytest.mark.parametrize("experiment", ["tuning_contribution"], indirect=True)
def test_what_rises(experiment):
    assert experiment.rises([0.1, 0.4, 1.0, 1.0]) and not experiment.rises([0.1, 0.4, 0.3, 1.0])
    assert not experiment.rises([1.0, 1.0])
    assert experiment.spearman([0, 1, 2], [0.1, 0.5, 0.7]) == pytest.approx(1)
    assert experiment.spearman([0, 1, 2], [0.7, 0.5, 0.1]) == pytest.approx(-1)
    assert experiment.spearman([0, 1, 2], [1, 1, 1]) == 0
    assert experiment.spearman([0, 1, 2], [0, 1, 1]) == pytest.approx(np.sqrt(3) / 2)
    told = experiment.told_of
    assert [told([True, True]), told([True, False]), told([False])] == ["held", "in part", "did not hold"]
    assert told([None, True]) == "not asked"
