"""pass@k and maj@k against counting every subset."""

from collections import Counter
from itertools import combinations, permutations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.passk import majority_at_k, pass_at_k
from analysis.results import Result
from surgery.errors import SurgeryError


def samples(*rows) -> Result:
    values = np.array(rows, dtype=float)
    return Result(values, {"example": range(len(values)), "sample": range(values.shape[1])}, "accuracy")


@given(st.lists(st.booleans(), min_size=1, max_size=9))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(row):
    ks = range(1, len(row) + 1)
    found = pass_at_k(samples(row), ks).values[0]
    for k, value in zip(ks, found, strict=True):
        assert value == pytest.approx(np.mean([any(subset) for subset in combinations(row, k)]), abs=1e-12)
    assert np.all(np.diff(found) >= -1e-12) and found[0] == pytest.approx(np.mean(row))


def test_pass_at_k_is_stable_for_many_samples():
    row = [1] + [0] * 1999
    assert pass_at_k(samples(row), [1000]).values[0, 0] == pytest.approx(0.5, abs=1e-12)
    assert pass_at_k(samples([0] * 2000), [1, 2000]).values.tolist() == [[0, 0]]
    assert pass_at_k(samples(row), [2000]).values[0, 0] == 1
    half = [1, 0] * 100
    assert pass_at_k(samples(half), [3]).values[0, 0] == pytest.approx(1 - comb(100, 3) / comb(200, 3), abs=1e-12)


def first_seen_majority(ordered) -> object:
    votes = Counter(answer for answer in ordered if answer is not None)
    return votes.most_common(1)[0][0] if votes else None  # Counter keeps the order in which answers were first seen


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c", "A", None]), min_size=1, max_size=6), st.integers(1, 6))
def test_majority_is_that_of_every_ordered_subset(said, k):
    k = min(k, len(said))
    right = [answer in ("a", "A") for answer in said]  # two different answers may both be right
    counted = [first_seen_majority(order) in ("a", "A") for order in permutations(said, k)]
    found = majority_at_k(samples(right), [said], [k])
    assert found.values[0, 0] == pytest.approx(np.mean(counted), abs=1e-12)


def test_majority_of_all_samples_and_of_many():
    row, said = [1] * 30 + [0] * 34, ["7"] * 30 + [str(i) for i in range(100, 134)]
    found = majority_at_k(samples(row), [said], [1, 16, 64])
    assert found.axes["k"] == [1, 16, 64]
    assert found.values[0, 0] == pytest.approx(30 / 64) and found.values[0, 2] == pytest.approx(1)
    assert 30 / 64 < found.values[0, 1] < 1
    assert majority_at_k(samples([1, 0]), [["x", None]], [1, 2]).values.tolist() == [[0.5, 1.0]]


def test_values_stay_per_prompt_with_their_columns():
    correct = Result([[1, 0], [0, 0]], {"example": ["p", "q"], "sample": [0, 1]}, columns={"task": ["m", "n"]})
    found = pass_at_k(correct, [1, 2])
    assert found.values.tolist() == [[0.5, 1], [0, 0]] and list(found.by("task")) == ["m", "n"]
    assert found.name == "pass@k" and found.labels == ["p", "q"]


def test_what_can_not_be_estimated_is_refused():
    with pytest.raises(SurgeryError, match="k = 3 needs that many samples a prompt: there are 2"):
        pass_at_k(samples([1, 0]), [1, 3])
    with pytest.raises(SurgeryError, match="one value a prompt"):
        pass_at_k(Result.of([1.0, 0.0]), [1])
    with pytest.raises(SurgeryError, match="other than 0 and 1"):
        pass_at_k(samples([0.5, 1]), [1])
    with pytest.raises(SurgeryError, match="1 prompts of 2 samples"):
        majority_at_k(samples([1, 0]), [["a"]], [1])
