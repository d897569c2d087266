"""The result class: statistics against textbook values, labels that can't drift, files that come back."""

import itertools
import warnings

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.results import Result, concatenate, stack
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
    assert few.p_value == 0.25
    with pytest.raises(SurgeryError, match="can't be paired"):
        one.paired_test(Result.of(base, labels=[f"p{i}" for i in range(60)]))


def flipped(values: np.ndarray) -> np.ndarray:
    """p-values by all sign patterns, written out."""
    patterns = itertools.product([-1, 1], repeat=len(values))
    means = np.array([[abs(np.mean(signs * column)) for column in values.T] for signs in patterns])
    return (means >= abs(values.mean(axis=0)) - 1e-12).mean(axis=0)


def test_mean_is_tested_against_all_sign_patterns():
    values = np.random.default_rng(3).normal([0, 0.6, 2], 1, size=(8, 3))
    result = Result(values, {"example": range(8), "head": range(3)})
    test = result.test()
    np.testing.assert_allclose(test.p_value, flipped(values), atol=1e-12)  # exact: 256 patterns
    assert test.p_value[2] == 2 / 256 and test.n == 8
    # Drawn patterns come near: 4 standard errors of 200 draws.
    drawn = result.test(permutations=200)
    np.testing.assert_allclose(drawn.p_value, flipped(values), atol=4 * 0.5 / 200**0.5)
    paired = Result(values + 5.0, result.axes).paired_test(Result(np.full_like(values, 5.0), result.axes))
    np.testing.assert_allclose(paired.p_value, test.p_value, atol=1e-12)


def test_p_values_of_no_effect_are_uniform_and_of_no_number_are_none():
    values = np.random.default_rng(0).normal(size=(30, 5000))  # more cells than one block holds
    values[3, 17] = np.nan
    result = Result(values, {"example": range(30), "cell": range(5000)})
    p_value = result.test(permutations=400).p_value
    assert np.flatnonzero(np.isnan(p_value)).tolist() == [17]
    assert np.nanmean(p_value <= 0.05) == pytest.approx(0.05, abs=0.02)  # one seed's flips are shared by all cells
    low, high = result.interval(resamples=200)
    assert np.isnan(low[17]) and np.isfinite(np.delete(low, 17)).all()
    one = result.select("cell", 4999)
    assert (low[4999], high[4999]) == pytest.approx(one.interval(resamples=200), abs=1e-12)


def pairs(n: int, rng: np.random.Generator, cells: int = 1) -> Result:
    """Effects that are 0.4 of a span which varies from pair to pair, and noise."""
    span = rng.gamma(4.0, 0.5, size=n)
    values = 0.4 * span[:, None] + rng.normal(0, 0.5, size=(n, cells))
    return Result(
        values, {"example": range(n), "layer": range(cells)}, "effect", {"span": span, "set": [*"ab"] * (n // 2)}
    )


def test_ratio_of_means_is_exact_for_all_and_for_parts():
    effect = pairs(40, np.random.default_rng(0), cells=3)
    span, ratio = np.array(effect.columns["span"]), effect.normalized()
    np.testing.assert_allclose(ratio.mean, effect.mean / span.mean(), rtol=1e-14)
    np.testing.assert_allclose(ratio.values, effect.values / span.mean(), rtol=1e-14)
    part = ratio.by("set")["b"]
    np.testing.assert_allclose(part.mean, effect.values[1::2].mean(axis=0) / span[1::2].mean(), rtol=1e-12)
    assert part.name == ratio.name == "effect / mean span"
    again = concatenate([ratio.by("set")["a"], part])
    np.testing.assert_allclose(again.mean, ratio.mean, rtol=1e-12)
    np.testing.assert_allclose(ratio.test().p_value, effect.test().p_value)  # zero above the line is zero
    assert not Result(np.ones((3, 1)), {"e": range(3), "l": [0]}, columns={"span": [1.0, 1, 1]}).normalized().binary


def test_interval_of_a_ratio_covers_and_its_standard_error_is_right():
    rng = np.random.default_rng(1)
    found = [pairs(60, rng).normalized() for _ in range(400)]
    truth, ends = 0.4, [r.interval(resamples=400, seed=i) for i, r in enumerate(found)]
    covered = np.mean([low[0] <= truth <= high[0] for low, high in ends])
    assert covered == pytest.approx(0.95, abs=0.035)  # 3 standard errors of 400 runs
    spread = np.std([r.mean[0] for r in found])
    assert np.mean([r.standard_error[0] for r in found]) == pytest.approx(spread, rel=0.12)
    # Values that follow the span vary as a mean does, and not at all as a ratio.
    span = rng.gamma(4.0, 0.5, size=50)
    tied = Result.of(2 * span, columns={"span": span}).normalized()
    assert tied.interval() == pytest.approx((2.0, 2.0)) and tied.standard_error == pytest.approx(0, abs=1e-12)
    assert np.subtract(*Result.of(2 * span / span.mean()).interval()) < -0.1


def test_baselines_that_coincide_are_refused():
    same = Result.of([0.5, 1.0], name="recovery", columns={"span": [1e-9, 1e-9]})
    with pytest.raises(SurgeryError, match="'recovery': baselines coincide: mean clean - corrupt is 1e-09"):
        same.normalized()
    tiny = Result.of([1e-9, 2e-9], columns={"span": [1e-9, 1e-9], "clean": [7.0, 8.0], "corrupt": [7.0, 8.0]})
    with pytest.raises(SurgeryError, match="baselines coincide"):
        tiny.normalized()
    prompts = Result.of([1.0, 2.0], columns={"span": [1.0, 3.0], "clean": ["a b", "c d"]})
    assert prompts.normalized().mean == pytest.approx(0.75)
    with pytest.raises(SurgeryError, match="baselines coincide"):
        Result.of([1.0, 2.0, 3.0], columns={"span": [1.0, -1.0, 3.0]}).normalized().where([True, True, False])
    with pytest.raises(SurgeryError, match="no column 'width'"):
        prompts.normalized("width")
    with pytest.raises(SurgeryError, match="one finite number"):
        prompts.normalized("clean")
    with pytest.raises(SurgeryError, match="ratio already"):
        prompts.normalized().normalized()
    other = Result.of([1.0, 2.0], columns={"span": [2.0, 2.0]})
    with pytest.raises(SurgeryError, match="ratios over different 'span'"):
        stack({"x": prompts.normalized(), "y": other.normalized()}, "model")
    with pytest.raises(SurgeryError, match="can't be put together"):
        concatenate([prompts.normalized(), other])
    with pytest.raises(SurgeryError, match="which it has not"):
        Result.of([1.0], meta={"ratio_of": "span"})


def test_per_example_ratios_are_infinite_without_a_warning():
    result = Result(np.array([[1.0, 0.0], [2.0, 3.0]]), {"e": "ab", "l": [0, 1]}, columns={"span": [0.0, 4.0]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ratio = result.per_example_ratio()
        np.testing.assert_array_equal(ratio.values, [[np.inf, np.nan], [0.5, 0.75]])
        assert ratio.mean[0] == np.inf and np.isnan(ratio.standard_error).all() and np.isnan(ratio.interval().low[1])
        assert np.isnan(ratio.test().p_value).all()
    assert result.normalized().mean.tolist() == [0.75, 0.75]


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


def test_parts_of_an_axis_by_label_and_place():
    result = Result(grid().values, {"example": list("abcd"), "layer": np.array([2, 4, 6]), "head": ["h0", "h1"]},
                    columns={"task": [*"xyxy"]}, meta={"ticks": {"layer": ["two", "four", "six"]}})  # fmt: skip
    one = result.select("layer", 4)
    assert list(one.axes) == ["example", "head"]
    np.testing.assert_array_equal(one.values, result.values[:, 1])
    some = result.select("layer", [6, 2])
    np.testing.assert_array_equal(some.values, result.values[:, [2, 0]])
    assert some.axes["layer"] == [6, 2] and some.meta["ticks"] == {"layer": ["six", "two"]}
    np.testing.assert_array_equal(result.select("layer", slice(-1, None)).values, result.values[:, 2:])
    np.testing.assert_array_equal(result.select("head", -1).values, result.select("head", "h1").values)
    first = result.select("example", ["c", "a"])
    assert first.columns["task"] == ["x", "x"] and first.labels == ["c", "a"]
    with pytest.raises(SurgeryError, match="'layer' of result 'value' has no 0.\nIt has: 2, 4, 6"):
        result.select("layer", [0])
    with pytest.raises(SurgeryError, match="no axis 'position'"):
        result.select("position", 0)


@pytest.mark.parametrize("how", ["mean", "sum", "max", "min"])
def test_axes_are_reduced(how):
    result = grid()
    np.testing.assert_array_equal(result.reduce("layer", how).values, getattr(np, how)(result.values, axis=1))
    assert list(result.reduce("layer", how).axes) == ["example", "head"]
    with pytest.raises(SurgeryError, match="no axis 'example'"):
        result.reduce("example", how)
    with pytest.raises(SurgeryError, match="mean, sum, max, min"):
        result.reduce("layer", "median")


def test_top_cells():
    values = np.array([[[1.0, -5.0], [np.nan, 3.0]]] * 2)
    result = Result(values, {"example": range(2), "layer": [0, 1], "head": ["h0", "h1"]})
    assert result.top(2) == [(1, "h1", 3.0), (0, "h0", 1.0)]
    assert result.top(1, largest=False) == [(0, "h1", -5.0)]
    assert result.top(9, absolute=True) == [(0, "h1", -5.0), (1, "h1", 3.0), (0, "h0", 1.0)]
    with pytest.raises(SurgeryError, match="no cells to rank"):
        Result.of([1.0]).top()


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


def test_labels_of_any_kind_and_missing_values_come_back(tmp_path):
    values = np.array([[1.0, np.nan], [np.inf, 0.5]])
    axes = {"example": np.arange(2), "head": [(0, 3), (1, np.int64(2))]}
    result = Result(values, axes, columns={"span": np.array([1.5, 2.0], dtype=np.float32)}, meta={"seed": np.int64(3)})
    result.save(tmp_path / "r")
    again = Result.load(tmp_path / "r")
    np.testing.assert_array_equal(again.values, values)
    assert again.axes == result.axes and again.columns == result.columns and again.meta == {"seed": 3}
    assert result.paired_test(again).n == 2 and again.select("head", (1, 2)).values.shape == (2,)
    ratio = Result.of([1.0, 2.0, 4.0], columns={"span": [1.0, 2.0, 3.0]}).normalized()
    ratio.save(tmp_path / "q")
    assert Result.load(tmp_path / "q").interval() == ratio.interval()


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


def sweep(low: float = -1.0, **meta) -> Result:
    values = np.linspace(low, 1.0, 24).reshape(3, 8)[None].repeat(2, axis=0)
    return Result(values, {"example": range(2), "layer": range(3), "position": range(8)}, "recovery", meta=meta)


def test_sweeps_are_drawn_from_both_sides_of_zero():
    axis = sweep(ticks={"position": [" a$b", "\n", *"cdefgh"]}).plot(title="resid_pre").axes[0]
    assert axis.images[0].get_clim() == (-1, 1) and axis.get_ylabel() == "layer" and axis.get_xlabel() == "position"
    assert [t.get_text() for t in axis.get_xticklabels()][:3] == ["·a\\$b", "↵", "c"]
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # layer 0 on top
    assert axis.patches and all(p.get_hatch() for p in axis.patches)
    assert sweep(0.0).plot().axes[0].images[0].get_clim() == (0, 1)
    assert sweep(0.0, centre=0).plot().axes[0].images[0].get_clim() == (-1, 1)
    turned = Result(np.ones((2, 4, 3)), {"example": range(2), "head": range(4), "layer": range(3)}).plot().axes[0]
    assert turned.get_ylabel() == "layer" and turned.images[0].get_array().shape == (3, 4)
    with pytest.raises(SurgeryError, match="7 ticks for axis 'position', which has 8"):
        sweep(ticks={"position": [*"abcdefg"]}).plot()


def test_four_axes_are_a_panel_each():
    five = stack({site: sweep() for site in ["q", "k", "v", "z", "pattern"]}, "site")
    figure = Result(np.moveaxis(five.values, -1, 1), {"example": range(2), "site": five.axes["site"], "layer": range(3),
                    "position": range(8)}).plot()  # fmt: skip
    assert [a.get_title() for a in figure.axes][:5] == ["site q", "site k", "site v", "site z", "site pattern"]
    assert {a.images[0].get_clim() for a in figure.axes[:5]} == {(-1.0, 1.0)}
    many = Result(np.ones((2, 7, 3, 2)), {"example": range(2), "site": range(7), "layer": range(3), "head": range(2)})
    with pytest.raises(SurgeryError, match=r"6 panels.\nTake `select\('site'"):
        many.plot()
    with pytest.raises(SurgeryError, match="at most 4"):
        Result(np.ones((1,) * 5), {c: [0] for c in "abcde"}).plot()
