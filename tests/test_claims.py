"""Every claim runs from end to end, and the table of claims quotes the stored results.

A claim is a script in `experiments/` with a `check`: it has `--fast` and `--out`, writes NAME.json (with "summary") and
NAME.png, prints `markdown(report["summary"])`, and says by `check(report)` what a fast run must show. What one of them
does inside is tested in a file of its own.
"""

import json
import os
import subprocess
import sys

import pytest
from claims import EXPERIMENTS, RESULTS

README = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
CLAIMS = sorted(path.stem for path in EXPERIMENTS.glob("*.py") if "\ndef check(" in path.read_text(encoding="utf-8"))
FAST_ALONE = {"conjugate_prompting", "entity_tracking", "smollm2_sft_grpo", "three_spaces", "tuning_contribution",
              "unir_transfer", "upscaling"}  # fmt: skip
"""Whose `check` asks for what a fast run alone has."""


def test_claims_are_found():
    assert len(CLAIMS) > 30


@pytest.mark.parametrize("experiment", CLAIMS, indirect=True)
def test_the_readme_quotes_the_stored_results(experiment):
    name = experiment.__name__
    report = json.loads((RESULTS / f"{name}.json").read_text())
    lines = [line for line in experiment.markdown(report["summary"]).splitlines() if line]
    assert len(lines) >= 3
    assert [line for line in lines if line not in README.splitlines()] == []
    assert f"results/{name}.png" in README and f"experiments/{name}.py" in README
    assert (RESULTS / f"{name}.json").stat().st_size < 100_000
    assert (RESULTS / f"{name}.png").stat().st_size < 100_000
    if name not in FAST_ALONE:
        experiment.check(report)


@pytest.mark.parametrize("experiment", CLAIMS, indirect=True)
def test_it_runs(experiment, tmp_path):
    name = experiment.__name__
    command = [sys.executable, str(EXPERIMENTS / f"{name}.py"), "--fast", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SURGERY_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / f"{name}.json").read_text())
    stored = json.loads((RESULTS / f"{name}.json").read_text())
    assert report.keys() == stored.keys() and report["summary"].keys() <= stored["summary"].keys()
    assert experiment.markdown(report["summary"]) in run.stdout
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    experiment.check(report)
