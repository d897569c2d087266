"""The claims about hidden skills run from end to end, and the table of claims quotes the stored results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from analysis.results import Result
from surgery.tasks import TASKS

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
RESULTS = EXPERIMENTS / "results"
README = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
CLAIMS = ["wrapper_study", "conjugate_prompting"]


def imported(name, monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return __import__(name)


@pytest.fixture(autouse=True)
def as_before():
    """Tasks and neighbours that a script brings along are forgotten afterwards."""
    tasks, modules = dict(TASKS), set(sys.modules)
    yield
    for name in set(TASKS) - set(tasks):
        del TASKS[name]
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(EXPERIMENTS)):
            del sys.modules[name]


@pytest.mark.parametrize("name", CLAIMS)
def test_the_readme_quotes_the_stored_results(name, monkeypatch):
    experiment = imported(name, monkeypatch)
    report = json.loads((RESULTS / f"{name}.json").read_text())
    lines = experiment.markdown(report["summary"]).splitlines()
    assert len(lines) >= 5
    assert [line for line in lines if line not in README.splitlines()] == []
    assert f"results/{name}.png" in README and f"experiments/{name}.py" in README
    assert (RESULTS / f"{name}.json").stat().st_size < 100_000
    assert (RESULTS / f"{name}.png").stat().st_size < 100_000


@pytest.mark.parametrize("name", CLAIMS)
def test_it_runs(name, monkeypatch, tmp_path):
    experiment = imported(name, monkeypatch)
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


def test_the_second_language_and_back(monkeypatch):
    experiment = imported("conjugate_prompting", monkeypatch)
    assert experiment.encode("r ebca=#") == "r jghf=#"
    assert experiment.decode("#fhgj") == "#acbe"
    assert experiment.decode("#fb") == "#a?", "an answer in the first language is not one in the second"
    rows = experiment.drawn(50, 1)
    other = experiment.drawn(50, 1, skip=rows)
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in other}
    assert all(row["answer"] != row["prompt"][2:-1] and set(row["answer"]) <= set("abcde") for row in rows)


def test_strings_to_sort(monkeypatch):
    experiment = imported("wrapper_study", monkeypatch)
    rows = experiment.drawn(50, 1)
    assert len({row["prompt"] for row in rows}) == 50
    assert all(row["answer"] == "".join(sorted(row["prompt"][2:-1])) for row in rows)
    assert all(row["answer"][0] != row["prompt"][2] for row in rows)
    assert [row["completion"] for row in experiment.copied(rows)] == ["#" + row["prompt"][2:-1] for row in rows]
    assert [row["answer"][0] for row in experiment.read_rows(3)] == list("aaabbbcccddd")


def test_the_control_sees_nothing_sorted(monkeypatch):
    experiment = imported("wrapper_study", monkeypatch)
    rows = experiment.NeverSorted(experiment.MEMBERS["base"].stages[1], seed=3)
    seen = [rows.row(i) for i in range(300)]
    copies = [row for row in seen if row["prompt"][0] in "sd"]
    assert len(copies) > 20 and all(row["completion"] == "#" + row["prompt"][2:-1] for row in copies)
    assert any(row["completion"] == "#" + row["prompt"][2:-1][::-1] for row in seen if row["prompt"][0] == "r")


@pytest.mark.parametrize(
    ("steps", "low", "high", "control", "said"),
    [
        (20.0, 0.6, 1.0, None, "held"),
        (20.0, 0.6, 1.0, 60.0, "held"),
        (20.0, 0.6, 1.0, 50.0, "in part"),
        (None, 0.6, 1.0, None, "in part"),
        (20.0, 0.4, 0.6, None, "no clear difference"),
        (50.0, 0.1, 0.4, 20.0, "the other way round"),
    ],
)
def test_the_verdict_on_revival(steps, low, high, control, said, monkeypatch):
    ours = {"runs": 5, "median_steps": steps, "low": low, "high": high}
    theirs = {"median_steps": control, "censored_at": 100}
    assert imported("wrapper_study", monkeypatch).of_revival(ours, theirs) == said


def test_the_best_number_of_neurons_is_at_least_one(monkeypatch):
    curve = Result(np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0]]), {"example": [0, 1], "pruned": [0, 1, 5]})
    assert imported("wrapper_study", monkeypatch).best_of(curve).values.tolist() == [0.0, 1.0]
