"""Inside the claims about SaRA."""

import json

import pytest
import torch
from claims import RESULTS

EXPERIMENT = "sara"


def test_the_stored_verdicts_follow_from_the_stored_runs(experiment):
    report = json.loads((RESULTS / f"{experiment.__name__}.json").read_text())
    rates = {arm: float(max(by, key=lambda rate, by=by: by[rate])) for arm, by in report["swept"].items()}
    again = experiment.summarised(report["runs"], rates)
    assert again["verdicts"] == report["summary"]["verdicts"]
    assert {a: row["rate"] for a, row in again["arms"].items()} == rates
    assert {a: row["rate"] for a, row in report["summary"]["arms"].items()} == rates


def test_the_effective_rank_counts_equal_singular_values(experiment):
    assert experiment.effective_rank(torch.eye(7)) == pytest.approx(7)
    assert experiment.effective_rank(torch.ones(4, 6)) == pytest.approx(1, abs=1e-6)
    assert experiment.effective_rank(torch.zeros(3, 3)) == 0
