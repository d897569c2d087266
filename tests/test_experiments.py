"""Every experiment runs from end to end on the shipped family, and the table of claims quotes the stored results."""

import json
import os
import subprocess
import sys

import pytest
from claims import EXPERIMENTS, RESULTS

README = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")

TABLES = {
    "merging_tradeoff": lambda module, report: module.markdown(report["summary"]),
    "merging_with_data": lambda module, report: module.markdown(report["results"]),
    "negation_analogy": lambda module, report: module.markdown(report["summary"]),
    "smollm2_merges": lambda module, report: module.markdown(report["scores"]),
}
"""What each experiment prints, made again from its JSON."""


def shape(thing, depth=3):
    """The keys of nested dictionaries."""
    if depth == 0 or not isinstance(thing, dict):
        return None
    return {key: shape(value, depth - 1) for key, value in thing.items()}


@pytest.mark.parametrize("experiment", TABLES, indirect=True)
def test_the_readme_quotes_the_stored_results(experiment):
    name = experiment.__name__
    report = json.loads((RESULTS / f"{name}.json").read_text())
    lines = TABLES[name](experiment, report).splitlines()
    assert len(lines) > 3
    assert [line for line in lines if line not in README.splitlines()] == []
    assert f"results/{name}.png" in README and f"experiments/{name}.py" in README


@pytest.mark.parametrize("name", TABLES)
def test_results_are_small_and_have_a_picture(name):
    assert (RESULTS / f"{name}.json").stat().st_size < 200_000
    assert (RESULTS / f"{name}.png").stat().st_size < 100_000


@pytest.mark.parametrize("experiment", TABLES, indirect=True)
def test_it_runs(experiment, tmp_path):
    name = experiment.__name__
    command = [sys.executable, str(EXPERIMENTS / f"{name}.py"), "--fast", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SURGERY_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    assert not (tmp_path / "cache").exists(), "a fast run trains nothing"
    report = json.loads((tmp_path / f"{name}.json").read_text())
    stored = json.loads((RESULTS / f"{name}.json").read_text())
    assert report.keys() == stored.keys()
    assert TABLES[name](experiment, report) in run.stdout
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    CHECKS[name](report)


def tradeoff(report):
    """One task at scale 1 of task arithmetic is the fine-tuning itself; the sweep has every scale."""
    row = report["orders"][0]["methods"]["task arithmetic"]
    assert len(row["tasks"]) == len(report["tasks"]) == 2
    assert row["scale"] in report["scales"] and set(row["validation"]) == {str(s) for s in report["scales"]}
    assert row["tasks"][0] == pytest.approx(1.0, abs=0.1)
    assert report["orders"][0]["base"][0] < 0.5, "there is something to merge for"
    assert all(len(s["methods"]["TIES"]["tasks"]) == len(report["scales"]) for s in report["sweeps"])


def negation(report):
    """An analogy between a pair and itself is the pair's other end, exactly; scale 0 is the base."""
    (analogy,) = report["analogy"]["identity"]
    assert analogy["C + (B - A)"]["cosine with D"] == pytest.approx(1.0, abs=1e-6)
    assert analogy["C + (B - A)"]["accuracy"] == analogy["D"]["accuracy"] > analogy["base"]["accuracy"]
    row = report["negation"][0]["chain"]
    assert row["vector"]["target"][0] == row["random"][0]["target"][0] == analogy["base"]["accuracy"]
    assert row["vector"]["likelihood"][-1] < row["vector"]["likelihood"][0], "the other way round, less likely"


def with_data(report):
    """Each fine-tuning does its own task, every way to merge was scored, and the soup is not another than itself."""
    results = report["results"]
    for name in ("chain", "rotate", "shift"):
        assert results[f"tuned on {name}"]["accuracy"][name] > 0.9 > 0.5 > results["base"]["accuracy"][name]
    assert {line["sees"] for line in results.values()} == {"nothing", "texts", "inputs", "held-out score"}
    assert results["uniform soup"]["against_uniform"] == {"difference": 0.0, "p_value": 1.0}
    assert results["RegMean 0.9"]["tasks"] > results["uniform soup"]["tasks"] > results["base"]["tasks"]


def real(report):
    """The vectors came back bit for bit, nothing was warned of, and the merged models write text."""
    assert all(v["restored_exactly"] for v in report["vectors"].values())
    assert set(report["made"]) == {"sum", "breadcrumbs", "ties", "dare_ties", "slerp"}
    assert all(model["warnings"] == [] for model in report["models"].values())
    assert all(sample["completion"] for sample in report["models"]["ties"]["samples"])
    merged, base = (report["scores"][model]["chain"]["accuracy"]["mean"] for model in ("ties", "tiny-base"))
    assert merged > base


CHECKS = {"merging_tradeoff": tradeoff, "merging_with_data": with_data, "negation_analogy": negation,
          "smollm2_merges": real}  # fmt: skip
