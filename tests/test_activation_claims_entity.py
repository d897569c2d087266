"""The claim about entity tracking runs from end to end, and the table of claims quotes the stored results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
README = (EXPERIMENTS / "README.md").read_text(encoding="utf-8").splitlines()
NAME = "entity_tracking"


@pytest.fixture
def experiment(monkeypatch):
    """The script as a module; its neighbours are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    modules = set(sys.modules)
    yield __import__(NAME)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(EXPERIMENTS)):
            del sys.modules[name]


def test_the_readme_quotes_the_stored_and_the_published_results(experiment):
    report = json.loads((EXPERIMENTS / "results" / f"{NAME}.json").read_text())
    lines = [*experiment.markdown(report["summary"]).splitlines(), *experiment.published().splitlines()]
    assert len(lines) == 2 + 2 + 4 + 2 + 2 + 6
    assert [line for line in lines if line not in README] == []


def test_published_recoveries_are_those_of_the_accuracies(experiment):
    assert "| CMAP from Goat into Llama: recovery | circuit 1.0 | A 1.0 | B 0.75 | C -0.25, D -0.06 |" in (
        experiment.published().splitlines()
    )


def test_it_runs(experiment, tmp_path):
    command = [sys.executable, str(EXPERIMENTS / f"{NAME}.py"), "--fast", "--out", str(tmp_path)]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / f"{NAME}.json").read_text())
    stored = json.loads((EXPERIMENTS / "results" / f"{NAME}.json").read_text())
    assert report.keys() == stored.keys() and experiment.markdown(report["summary"]) in run.stdout
    assert (tmp_path / f"{NAME}.png").read_bytes().startswith(b"\x89PNG")
    experiment.check(report)


def test_stories_are_consistent(experiment):
    from random import Random

    for seed in range(50):
        row = experiment.story(Random(seed), moves=2)
        asked = row["names"][row["asked"]]
        last = [fact for fact in row["prompt"][2:].split("where")[0].split(";") if fact.startswith(f"{asked} ")][-1]
        assert last.endswith(row["answer"]) and row["prompt"].count(" to ") == 2 and f"where {asked}=#" in row["prompt"]
