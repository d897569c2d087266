"""Inside the claims about hidden skills."""

import numpy as np
import pytest

from analysis.results import Result


@pytest.mark.parametrize("experiment", ["conjugate_prompting"], indirect=True)
def test_the_second_language_and_back(experiment):
    assert experiment.encode("r ebca=#") == "r jghf=#"
    assert experiment.decode("#fhgj") == "#acbe"
    assert experiment.decode("#fb") == "#a?", "an answer in the first language is not one in the second"
    rows = experiment.drawn(50, 1)
    other = experiment.drawn(50, 1, skip=rows)
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in other}
    assert all(row["answer"] != row["prompt"][2:-1] and set(row["answer"]) <= set("abcde") for row in rows)


@pytest.mark.parametrize("experiment", ["wrapper_study"], indirect=True)
def test_strings_to_sort(experiment):
    rows = experiment.drawn(50, 1)
    assert len({row["prompt"] for row in rows}) == 50
    assert all(row["answer"] == "".join(sorted(row["prompt"][2:-1])) for row in rows)
    assert all(row["answer"][0] != row["prompt"][2] for row in rows)
    assert [row["completion"] for row in experiment.copied(rows)] == ["#" + row["prompt"][2:-1] for row in rows]
    assert [row["answer"][0] for row in experiment.read_rows(3)] == list("aaabbbcccddd")


@pytest.mark.parametrize("experiment", ["wrapper_study"], indirect=True)
def test_the_control_sees_nothing_sorted(experiment):
    rows = experiment.NeverSorted(experiment.MEMBERS["base"].stages[1], seed=3)
    seen = [rows.row(i) for i in range(300)]
    copies = [row for row in seen if row["prompt"][0] in "sd"]
    assert len(copies) > 20 and all(row["completion"] == "#" + row["prompt"][2:-1] for row in copies)
    assert any(row["completion"] == "#" + row["prompt"][2:-1][::-1] for row in seen if row["prompt"][0] == "r")


@pytest.mark.parametrize("experiment", ["wrapper_study"], indirect=True)
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
def test_the_verdict_on_revival(steps, low, high, control, said, experiment):
    ours = {"runs": 5, "median_steps": steps, "low": low, "high": high}
    theirs = {"median_steps": control, "censored_at": 100}
    assert experiment.of_revival(ours, theirs) == said


@pytest.mark.parametrize("experiment", ["wrapper_study"], indirect=True)
def test_the_best_number_of_neurons_is_at_least_one(experiment):
    curve = Result(np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0]]), {"example": [0, 1], "pruned": [0, 1, 5]})
    assert experiment.best_of(curve).values.tolist() == [0.0, 1.0]
