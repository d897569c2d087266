"""Figures: what is drawn, without any window and without a trace in pyplot."""

import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from analysis import plots


def texts(figure, axis=0):
    return [t.get_text() for t in figure.axes[axis].texts]


def legend(figure):
    (found,) = figure.legends or [figure.axes[0].get_legend()]
    return [t.get_text() for t in found.get_texts()]


def test_heat_map_writes_every_number_and_crosses_out_what_is_not_there():
    figure = plots.heat_map([[0.1, np.nan], [0.25, 0.4]], [0, 1], ["q", "k"], unit="share", title="zeros")
    assert texts(figure) == ["0.1", "0.25", "0.4"] and len(figure.axes[0].lines) == 1
    assert figure.axes[1].get_ylabel() == "share"
    assert figure.axes[0].images[0].get_clim() == (0, 0.4)


def test_large_maps_have_no_numbers_and_few_ticks():
    figure = plots.heat_map(np.random.default_rng(0).random((100, 4)), range(100), list("abcd"))
    assert not texts(figure) and len(figure.axes[0].get_yticks()) <= 40


def test_matrix_hatches_what_is_negative():
    figure = plots.matrix([[1, -0.5, -0.001], [-0.5, 1, 0.2], [-0.001, 0.2, 1]], ["a", "b", "c"])
    assert texts(figure)[:3] == ["1.00", "-0.50", "0.00"]
    assert [p.get_hatch() for p in figure.axes[0].patches] == ["///", "///"]
    assert "negative" in figure.axes[1].get_ylabel()


def test_spectrum_marks_the_rank_of_the_energy():
    figure = plots.spectrum({"a": np.array([3.0, 1.0, 1.0]), "b": np.zeros(3)}, energy=0.9)
    assert "a: 90% at rank 2" in [t.get_text() for t in figure.axes[1].get_legend().get_texts()]
    assert figure.axes[0].get_yscale() == "log"


def test_ulp_histogram_in_percent_with_the_unchanged_apart():
    counts = np.zeros(32)
    counts[8], counts[9], counts[31] = 0.5, 0.2, 1e-6
    figure = plots.ulp_histogram({"a": counts, "b": counts[::-1]}, -8, zeros={"a": 0.3, "b": 0.1}, dtype="BF16")
    heights = [p.get_height() for p in figure.axes[0].patches]
    assert 50 in heights and 30 in heights
    assert figure.axes[0].get_xticklabels()[0].get_text() == "none" and "1 ulp of BF16" in texts(figure)
    narrow = plots.ulp_histogram({"a": counts}, -8)
    assert len(narrow.axes[0].patches) == 2


def test_series_differ_without_colour():
    names = [f"m{i}" for i in range(6)]
    figure = plots.bars({n: [1, 2] for n in names}, ["x", "y"], reference=1.5, reference_label="chance")
    assert len({p.get_hatch() for p in figure.axes[0].patches}) == 6
    assert set(legend(figure)) == {*names, "chance"}
    figure = plots.curves([1, 2], {n: [i, i + 1] for i, n in enumerate(names)}, x_label="tasks", y_label="accuracy")
    lines = figure.axes[0].lines
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == 6 and legend(figure) == names


def test_curves_with_intervals_and_references():
    figure = plots.curves([0.1, 1, 10], {"a": ([1, 2, 3], [0.5, 1, 2], [2, 3, 4])}, x_label="x", y_label="y",
                          references={"base": 0.2}, log_x=True)  # fmt: skip
    assert texts(figure) == ["base"] and figure.axes[0].get_xscale() == "log" and figure.axes[0].containers


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_saved_as_the_suffix_says_and_no_pyplot(tmp_path, suffix):
    figure = plots.curves([0, 1], {"a": [0, 1]}, x_label="x", y_label="y")
    assert isinstance(figure, Figure)
    path = plots.save(figure, tmp_path / "deep" / f"f.{suffix}")
    assert path.stat().st_size > 1000
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_intervals_stand_side_by_side_with_a_marker_for_each_series():
    shares = {"tuned": ([1.0, 0.5], [0.9, 0.4], [1.0, 0.6]), "base": ([0.2, 0.1], [0.1, 0.0], [0.3, 0.2])}
    figure = plots.intervals(shares, ["chain", "copy"], y_label="accuracy", group_label="task")
    axis = figure.axes[0]
    first, second = (container.lines[0] for container in axis.containers)
    assert first.get_xdata() == pytest.approx([-0.15, 0.85]) and second.get_xdata() == pytest.approx([0.15, 1.15])
    assert first.get_marker() != second.get_marker() and legend(figure) == ["tuned", "base"]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["chain", "copy"] and axis.get_ylim()[1] > 1
