"""The result class: statistics against textbook values, labels that can't drift, files that come back."""

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.results import Result, concatenate
from surgery.errors import SurgeryError

matplotlib.use("Agg")


def test_wilson_interval_of_a_share():
    low, high = Result.of([1] * 8 + [0] * 2).interval()
    assert (low, high) == pytest.approx((0.49016, 0.94332), abs=1e-4)  # Wilson score interval of 8 in 10
    low, high = Result.of([0] * 10).interval()
    assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(0.27753, abs=1e-4)


def test_bootstrap_interval_is_seeded_and_of_the_right_width():
    values = np.random.default_rng(1).normal(3, 2, size=400)
    result = Result.of(values)
    low, high = result.interval(seed=5)
    assert (low, high) == result.interval(seed=5) != result.interval(seed=6)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * result.standard_error, rel=0.1)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30))
def test_mean_and_standard_error(values):
    result = Result.of(values)
    assert result.mean == pytest.approx(sum(values) / len(values), abs=1e-6)
    assert result.standard_error == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5, abs=1e-6)
    low, high = result.interval(resamples=200)
    assert result.binary or min(values) - 1e-6 <= low <= high <= max(values) + 1e-6


def test_paired_test_sees_a_difference_and_no_difference():
    rng = np.random.default_rng(0)
    base = rng.normal(size=60)
    one, same, better = Result.of(base), Result.of(base), Result.of(base + 0.5 + 0.1 * rng.normal(size=60))
    assert one.paired_test(same).p_value == 1.0
    test = better.paired_test(one)
    assert test.difference == pytest.approx(0.5, abs=0.05) and test.p_value < 0.001 and test.n == 60
    assert test == better.paired_test(one)
    # Three pairs that all agree: one quarter of the eight sign patterns is as extreme.
    few = Result.of([1.0, 1.0, 1.0]).paired_test(Result.of([0.0, 0.0, 0.0]))
    assert few.p_value == pytest.approx(0.25, abs=0.02)
    with pytest.raises(SurgeryError, match="can't be paired"):
        one.paired_test(Result.of(base, labels=[f"p{i}" for i in range(60)]))


def grid() -> Result:
    values = np.arange(24.0).reshape(4, 3, 2)
    axes = {"example": list("abcd"), "layer": [0, 1, 2], "head": ["h0", "h1"]}
    return Result(values, axes, "effect", {"task": ["x", "y", "x", "y"]}, {"model": "tiny"})


def test_more_axes_are_reduced_over_the_examples_only():
    result = grid()
    assert result.mean.shape == result.standard_error.shape == (3, 2)
    assert result.interval().low.shape == result.paired_test(result).p_value.shape == (3, 2)
    frame = result.to_dataframe()
    assert list(frame.columns) == ["example", "task", "layer", "head", "effect"] and len(frame) == 24
    assert frame.query("example == 'c' and layer == 1 and head == 'h1'")[["task", "effect"]].values.tolist() == [
        ["x", 15]
    ]


def test_groups_and_concatenation_are_inverse():
    result = grid()
    groups = result.by("task")
    assert list(groups) == ["x", "y"] and list(groups["y"].labels) == ["b", "d"]
    np.testing.assert_array_equal(groups["y"].values, result.values[1::2])
    again = concatenate(list(groups.values()), group=["x", "y"])
    assert list(again.labels) == ["a", "c", "b", "d"] and again.columns["group"] == again.columns["task"]


@pytest.mark.parametrize("name", ["run", "run.json", "run.v2", "deep/run.safetensors"])
def test_save_and_load(tmp_path, name):
    result = grid()
    assert result.save(tmp_path / name).suffix == ".json"
    again = Result.load(tmp_path / name)
    np.testing.assert_array_equal(again.values, result.values)
    assert (again.axes, again.columns, again.meta, again.name) == (result.axes, result.columns, result.meta, "effect")
    assert not list(tmp_path.rglob(".*"))


def test_what_is_not_a_result_is_said(tmp_path):
    with pytest.raises(SurgeryError, match="is missing"):
        Result.load(tmp_path / "nothing")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(SurgeryError, match="not a saved result"):
        Result.load(tmp_path / "bad")
    with pytest.raises(SurgeryError, match="shape"):
        Result.of([1.0, 2.0], labels=["only one"])
    with pytest.raises(SurgeryError, match="column 'task' has 1"):
        Result.of([1.0, 2.0], columns={"task": ["x"]})


def test_figures():
    flat = Result.of([0, 1, 1, 0], columns={"task": ["x", "y", "y", "x"]}, name="accuracy")
    assert [t.get_text() for t in flat.plot(by="task").axes[0].get_xticklabels()] == ["x", "y"]
    line = Result(np.ones((3, 5)), {"example": range(3), "layer": range(5)})
    assert line.plot().axes[0].get_xlabel() == "layer"
    assert grid().plot().axes[0].get_ylabel() == "layer"
    assert str(flat).startswith("accuracy 0.500 [")
    assert flat.summary()["n"] == 4
