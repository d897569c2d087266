"""Accuracy over compute: expectations against counting every subset, and what is counted as compute."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.equal_compute import Curve, at_compute, best_at_k, figure, sample_curves, tree_curve, weighted_at_k
from analysis.passk import majority_at_k, pass_at_k
from analysis.results import Result
from surgery.decoding import Rollout
from surgery.errors import SurgeryError
from surgery.logits.search.selection import Sample, weighted_vote
from surgery.logits.search.steps import Path, Step, Tree

ROWS = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.sampled_from(["3", "4", "5", None]), min_size=n, max_size=n),
        st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.75]), min_size=n, max_size=n),
    )
)


def correct(*answers):
    values = np.array([[float(a == "4") for a in row] for row in answers])
    return Result(values, {"example": range(len(values)), "sample": range(values.shape[1])}, "accuracy")


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_best_at_k_is_the_mean_over_subsets(row):
    answers, scores = row
    ks = range(1, len(answers) + 1)
    found = best_at_k(correct(answers), [scores], ks).values[0]
    for k, value in zip(ks, found, strict=True):
        each = []
        for subset in combinations(range(len(answers)), k):
            top = max(scores[s] for s in subset)
            each.append(np.mean([answers[s] == "4" for s in subset if scores[s] == top]))
        # Ties are shared among all samples of that score, which over all subsets is the same.
        assert value == pytest.approx(np.mean(each), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_weighted_at_k_is_the_mean_of_the_votes(row):
    answers, weights = row
    ks = range(1, len(answers) + 1)
    found = weighted_at_k(correct(answers), [answers], [weights], ks).values[0]
    for k, value in zip(ks, found, strict=True):
        each = []
        for subset in combinations(range(len(answers)), k):
            votes = weighted_vote([Sample("", answers[s], (), weights[s]) for s in subset]).support
            winners = [a for a, v in votes.items() if v == max(votes.values())]
            each.append(np.mean([a == "4" for a in winners]) if winners else 0.0)
        assert value == pytest.approx(np.mean(each), abs=1e-12)


def test_equal_weights_are_the_majority_and_an_oracle_is_pass_at_k():
    rng = np.random.default_rng(0)
    answers = rng.choice(["3", "4", "5"], (6, 9)).tolist()
    right = correct(*answers)
    many = weighted_at_k(right, answers, np.ones((6, 9)).tolist(), [1, 2, 8, 9]).values
    np.testing.assert_allclose(many, majority_at_k(right, answers, [1, 2, 8, 9]).values, atol=1e-12)
    np.testing.assert_allclose(
        best_at_k(right, right.values.tolist(), [1, 4, 9]).values, pass_at_k(right, [1, 4, 9]).values, atol=1e-12
    )


def test_drawn_subsets_depend_on_the_seed_alone():
    rng = np.random.default_rng(1)
    answers = rng.choice(["3", "4"], (40, 14)).tolist()
    right, even = correct(*answers), np.ones((40, 14)).tolist()
    first, again, other = (weighted_at_k(right, answers, even, [7], seed=s).values for s in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.abs(first - majority_at_k(right, answers, [7]).values).max() < 0.12, "within 3.4 of 0.5 / sqrt(200)"


def rollout(prompt, length, answer):
    return Rollout([1] * prompt, [2] * length, [-0.5] * length, False, f"#{answer}")


def test_compute_is_tokens_times_parameters():
    answers = [["4", "3"], ["4", "4"]]
    groups = [[rollout(5, 3, "4"), rollout(5, 7, "3")], [rollout(2, 4, "4"), rollout(2, 4, "4")]]
    scores = [[1.0, 0.0], [0.5, 0.5]]
    found = sample_curves(
        groups, correct(*answers), answers, [1, 2], parameters=10, scores=scores, weights=scores, scoring=5
    )
    assert list(found) == ["pass@k", "majority", "weighted vote", "best of k"]
    assert found["majority"].compute.values.tolist() == [[100, 150], [60, 100]]  # (5 + 5k) 10, (2 + 4k) 10
    assert found["best of k"].compute.values.tolist() == [[150, 225], [90, 150]]
    assert found["pass@k"].right.values.tolist() == [[0.5, 1], [1, 1]]
    assert found["best of k"].right.values.tolist() == [[0.5, 1], [1, 1]]


def test_trees():
    step = Step((7, 8, 9), (-0.1,) * 3, (), 0.5)
    tree = Tree((Path(0, (1, 2), (step, step)),), (4, 3), 21)
    found = tree_curve({4: [tree, tree], 8: [tree, tree]}, lambda i, t: i == 1, parameters=3, labels=["a", "b"])
    assert found.right.values.tolist() == [[0, 0], [1, 1]] and found.right.labels == ["a", "b"]
    assert np.unique(found.compute.values).tolist() == [69]
    with pytest.raises(SurgeryError, match="the same prompts"):
        tree_curve({4: [tree], 8: []}, lambda i, t: True, parameters=3)


def line(values, compute):
    axes = {"example": range(len(values)), "k": range(1, len(compute) + 1)}
    return Curve(Result(np.array(values), axes, "line"), Result(np.array([compute] * len(values)), axes, "compute"))


def test_equal_compute_is_read_between_the_points_and_never_beyond():
    found = at_compute({"a": line([[0.0, 1.0], [0.5, 0.5]], [10.0, 1000.0])}, [1, 10, 100, 1000, 5000])["a"]
    np.testing.assert_allclose(found.values[0], [np.nan, 0, 0.5, 1, np.nan], atol=1e-12)
    np.testing.assert_allclose(found.values[1, 1:4], 0.5, atol=1e-12)
    assert found.axes["compute"] == [1, 10, 100, 1000, 5000]


def test_figure():
    rng = np.random.default_rng(0)
    curves = {name: line(rng.random((20, 3)), [10.0, 30.0, 100.0]) for name in ("majority", "REBASE")}
    drawn = figure(curves, title="sums", floor=0.4)
    (axis,) = drawn.axes
    assert axis.get_xscale() == "log" and "compute" in axis.get_xlabel()
    assert [c.get_label() for c in axis.containers] == ["majority, k = 1 to 3", "REBASE, k = 1 to 3"]


def test_wrong_input():
    right = correct(["4", "3"])
    with pytest.raises(SurgeryError, match="Finite scores are needed"):
        best_at_k(right, [[1.0]], [1])
    with pytest.raises(SurgeryError, match="Finite weights are needed"):
        weighted_at_k(right, [["4", "3"]], [[1.0, float("nan")]], [1])
    with pytest.raises(SurgeryError, match="k = 3 needs that many"):
        best_at_k(right, [[1.0, 0.0]], [3])
    with pytest.raises(SurgeryError, match="Rollouts are needed"):
        sample_curves([[rollout(2, 2, "4")]], right, [["4", "3"]], [1], parameters=1)
