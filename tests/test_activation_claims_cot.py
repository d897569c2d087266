"""The claim about chains of thought runs from end to end, and the table of claims quotes the stored results."""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
RESULTS = EXPERIMENTS / "results"
README = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
NAME = "cot_faithfulness"


@pytest.fixture
def experiment(monkeypatch):
    """The script as a module; its neighbours are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    modules = set(sys.modules)
    yield __import__(NAME)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(EXPERIMENTS)):
            del sys.modules[name]


def test_the_readme_quotes_the_stored_results(experiment):
    report = json.loads((RESULTS / f"{NAME}.json").read_text())
    lines = [line for line in experiment.markdown(report["summary"]).splitlines() if line]
    assert len(lines) == 2 + 2 * 6 + 1
    assert [line for line in lines if line not in README.splitlines()] == []
    assert f"results/{NAME}.png" in README and f"experiments/{NAME}.py" in README
    assert (RESULTS / f"{NAME}.json").stat().st_size < 100_000
    assert (RESULTS / f"{NAME}.png").stat().st_size < 100_000


def test_it_runs(experiment, tmp_path):
    command = [sys.executable, str(EXPERIMENTS / f"{NAME}.py"), "--fast", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SURGERY_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / f"{NAME}.json").read_text())
    stored = json.loads((RESULTS / f"{NAME}.json").read_text())
    assert report.keys() == stored.keys()
    assert experiment.markdown(report["summary"]) in run.stdout
    assert (tmp_path / f"{NAME}.png").read_bytes().startswith(b"\x89PNG")
    experiment.check(report)


def test_a_mistake_is_carried_to_the_answer(experiment):
    steps = ["3+5=8;", "8-2=6;", "6+9=5;"]
    for at in range(3):
        for seed in range(20):
            found = experiment.carried(steps, at, Random(seed))
            assert found.steps[:at] == steps[:at] and found.answer == found.steps[-1][-2] != "5"
            results = [step[-2] for step in found.steps]
            for i, step in enumerate(found.steps):
                true = (int(step[0]) + int(step[2]) if step[1] == "+" else int(step[0]) - int(step[2])) % 10
                assert (results[i] == str(true)) == (i != at), "one step is wrong"
                assert step[1:3] == steps[i][1:3] and (i == 0 or step[0] == results[i - 1])


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ([(-0.3, -0.1), (-0.2, -0.01)], "held"),
        ([(-0.3, -0.1), (-0.2, 0.1)], "in part"),
        ([(-0.1, 0.1), (0.1, 0.2)], "the other way round"),
        ([(-0.1, 0.1), (-0.1, 0.1)], "no clear difference"),
        ([(None, None), (None, None)], "not asked"),
    ],
)
def test_the_verdict(experiment, ends, said):
    assert experiment.verdict([{"low": low, "high": high} for low, high in ends]) == said
