"""Every claim about training runs from end to end, and the table of claims quotes the stored results.

A script in `CLAIMS` has `--fast` and `--out`, writes NAME.json (with "summary") and NAME.png, prints
`markdown(report["summary"])`, and says by `check(report)` what a fast run must show.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from surgery.tasks import TASKS

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
RESULTS = EXPERIMENTS / "results"
README = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")

CLAIMS: list[str] = [
    "reasoning_vectors",
    "smollm2_sft_grpo",
    "sft_then_grpo",
    "no_signal",
    "echo_chamber",
    "masked_thought_vs_sft",
    "forgetting",
    "reft",
    "sec_curriculum",
    "cosine_length",
]


@pytest.fixture
def experiment(request, monkeypatch):
    """One script as a module. It may register tasks and import its neighbours: afterwards all is as before."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    tasks, modules = dict(TASKS), set(sys.modules)
    yield __import__(request.param)
    for name in set(TASKS) - set(tasks):
        del TASKS[name]
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(EXPERIMENTS)):
            del sys.modules[name]


@pytest.mark.parametrize("experiment", CLAIMS, indirect=True)
def test_the_readme_quotes_the_stored_results(experiment):
    name = experiment.__name__
    report = json.loads((RESULTS / f"{name}.json").read_text())
    lines = experiment.markdown(report["summary"]).splitlines()
    assert len(lines) >= 3
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
