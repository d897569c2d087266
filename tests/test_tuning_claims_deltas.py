"""The claim about adding sparse deltas runs from end to end, and the table of claims quotes the stored results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
RESULTS = EXPERIMENTS / "results"
CLAIMS = ["sparse_deltas"]


@pytest.fixture
def experiment(monkeypatch):
    modules = set(sys.modules)
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    yield __import__(CLAIMS[0])
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(EXPERIMENTS)):
            del sys.modules[name]


def test_the_readme_quotes_the_stored_results(experiment):
    readme = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    report = json.loads((RESULTS / "sparse_deltas.json").read_text())
    lines = [line for line in experiment.markdown(report["summary"]).splitlines() if line]
    assert len(lines) > 30
    assert [line for line in lines if line not in readme.splitlines()] == []
    assert "results/sparse_deltas.png" in readme and "experiments/sparse_deltas.py" in readme
    assert (RESULTS / "sparse_deltas.json").stat().st_size < 100_000
    assert (RESULTS / "sparse_deltas.png").stat().st_size < 100_000


def test_it_runs(experiment, tmp_path):
    command = [sys.executable, str(EXPERIMENTS / "sparse_deltas.py"), "--fast", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SURGERY_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "sparse_deltas.json").read_text())
    stored = json.loads((RESULTS / "sparse_deltas.json").read_text())
    assert report.keys() == stored.keys()
    assert experiment.markdown(report["summary"]) in run.stdout
    assert (tmp_path / "sparse_deltas.png").read_bytes().startswith(b"\x89PNG")
    experiment.check(report)


def test_the_arm_called_lt_sft_is_the_lottery_of_recipes(experiment):
    """At one learning rate for both phases: the same numbers, trained to the same bits."""
    settings = {"steps": {"task": 2, "cipher": 2}, "rows": 4}
    dense = experiment.tuned("task", 3, 1e-3, None, settings)
    chosen = experiment.selection("LT-SFT", 0.01, 3, dense, None)
    ours = experiment.tuned("task", 3, 1e-3, chosen, settings)
    density = chosen.count / experiment.start()[2]
    words = {"lottery": {"density": density, "modules": experiment.MODULES}}
    drawn = experiment.tuned("task", 3, 1e-3, words, settings)
    moved = 0
    for before, one, other in zip(*(m.parameters() for m in (experiment.start()[0], ours, drawn)), strict=True):
        assert torch.equal(one, other)
        moved += int((one != before).sum())
    assert 0.9 * chosen.count < moved <= chosen.count


def test_the_cipher_changes_answers_only(experiment):
    row = {"prompt": "c ajb=", "completion": "#ajb", "answer": "ajb", "task": "copy"}
    assert experiment.ciphered(row) == {**row, "completion": "#bac", "answer": "bac"}
    rows = experiment.Rows("cipher", 0)
    assert rows.row(5) == rows.row(5) != rows.row(6)
    plain, changed = (experiment.questions(name, 50, 990) for name in ("rotate", "rotate*"))
    assert [r["prompt"] for r in plain] == [r["prompt"] for r in changed]
    assert all(a["answer"] != b["answer"] for a, b in zip(plain, changed, strict=True))


@pytest.mark.parametrize(
    ("both", "lost", "said"), [((0.3, 0.1), -0.1, "held"), ((0.3, 0.1), 0.2, "in part"), ((-0.1, -0.3), 0.0, "other")]
)
def test_the_verdict_follows_its_rule(experiment, both, lost, said):
    """From made-up runs in which LT-SFT at 5 % differs from all others by `both`, and loses `lost` more."""
    from analysis.results import Result

    runs = {}
    for seed, offset in enumerate(both * 2):
        run = {}
        for arm in experiment.ARMS:
            mine = arm == "LT-SFT 5%"
            values = [0.5 + (offset if mine else 0.0)] * 4
            run[arm] = {**dict.fromkeys(experiment.PLAIN, 0.5), "both": Result.of(values, "abcd"), "count": [1, 1]}
            run[arm] |= {"both, scaled": run[arm]["both"], "lost": 0.1 + (lost + 0.01 * seed if mine else 0.0)}
        runs[seed] = run
    found = {"rates": {"full": {}}, "scales": dict.fromkeys(experiment.ARMS, 1.0)}
    verdicts = experiment.summarised(runs, found)["verdicts"]
    assert said in verdicts["less interference than full, 5%"]
    assert verdicts["less interference than full, 1%"] == "no clear difference"
    assert verdicts["a sibling's mask transfers, 1%"] == "no clear difference"


def test_asked_afterwards_are_arms_that_fit_as_well_at_their_smallest_rates(experiment):
    from analysis.results import Result

    both = {"cipher": {"0.003": -0.05, "0.01": -0.02}, "task": {"0.003": -0.3, "0.01": -0.004}}
    scores = {
        "full": {kind: {"0.001": -0.048} for kind in both},
        "LT-SFT 5%": both,
        "random 5%": {**both, "cipher": {"0.003": -0.2, "0.01": -0.06}},
    }
    found = {"scores": scores}
    assert experiment.gentle(found) == {"LT-SFT 5%": {"cipher": 0.003, "task": 0.01}}
    one = dict.fromkeys(experiment.PLAIN, 0.5)
    runs = {s: {"full": {**one, "both": Result.of([0, 0, 1, 1], "abcd")},
                "LT-SFT 5%": {**one, "both": Result.of([1, 1, 1, 1], "abcd")}} for s in (1, 2)}  # fmt: skip
    told = experiment.told_afterwards(runs, found)["LT-SFT 5%"]
    assert told["both"]["mean"] == 1 and told["more"]["mean"] == 0.5
