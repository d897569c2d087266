"""Inside the claims about CorDA's two modes."""

import json

import pytest
from claims import RESULTS

EXPERIMENT = "corda_modes"


def test_the_stored_verdicts_follow_from_the_stored_runs(experiment):
    report = json.loads((RESULTS / f"{experiment.__name__}.json").read_text())
    rates = {claim: {arm: max(map(float, by), key=lambda rate, by=by: by[f"{rate:g}"]) for arm, by in arms.items()}
             for claim, arms in report["swept"].items()}  # fmt: skip
    again = experiment.summarised(report["runs"], rates)
    for claim, found in report["summary"].items():
        assert again[claim]["verdict"] == found["verdict"]
        for arm, row in found["arms"].items():  # which are rounded to four decimals
            assert again[claim]["arms"][arm]["rate"] == row["rate"]
            assert again[claim]["arms"][arm]["kept"]["mean"] == pytest.approx(row["kept"]["mean"], abs=2e-4)


def test_a_claim_needs_its_controls_and_equal_accuracy(experiment):
    up, level = {"mean": 0.1, "low": 0.05, "high": 0.15}, {"mean": 0.1, "low": -0.05, "high": 0.25}
    assert experiment.verdict({"LoRA": up, "identity": up}, 0.0) == "held"
    assert experiment.verdict({"LoRA": up, "identity": level}, 0.0) == "in part"
    assert experiment.verdict({"LoRA": up, "identity": up}, 0.06) == "did not hold"
    assert experiment.verdict({"LoRA": level, "identity": up}, 0.0) == "did not hold"
