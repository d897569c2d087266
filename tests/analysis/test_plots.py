"""Figures: what is drawn, without any window and without a trace in pyplot."""

import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from analysis import plots
from analysis.style import shown, tick
from surgery.errors import SurgeryError


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


def test_diverging_map_is_alike_on_both_sides_and_hatches_what_is_negative():
    figure = plots.diverging_map([[0.5, -1.0, np.nan], [-0.01, np.inf, -0.2]], [0, 1], ["The", " cat", "\n"], unit="x")
    axis = figure.axes[0]
    assert axis.images[0].get_clim() == (-1, 1) and texts(figure) == ["0.50", "-1.00", "-0.01", "-0.20"]
    assert [(p.get_xy(), p.get_hatch()) for p in axis.patches] == [((0.5, -0.5), "///"), ((1.5, 0.5), "///")]
    assert len(axis.lines) == 1  # the cell that is not there
    assert figure.axes[1].get_ylabel() == "x (hatched: negative)"
    assert [t.get_text() for t in axis.get_xticklabels()] == ["The", "·cat", "↵"]
    colours = axis.images[0].cmap([0.0, 0.5, 1.0])[:, :3] @ [0.299, 0.587, 0.114]
    assert colours[1] > 0.98 and abs(colours[0] - colours[2]) < 0.1  # grey says how much, not which sign
    assert plots.diverging_map([[0.0]], [0], [0]).axes[0].images[0].get_clim() == (-1, 1)


def test_a_large_map_has_a_label_for_each_token_and_room_for_it():
    tokens = [f" token{i}" for i in range(60)]
    figure = plots.diverging_map(np.random.default_rng(0).normal(size=(30, 60)), range(30), tokens)
    axis = figure.axes[0]
    figure.draw_without_rendering()
    boxes = [t.get_window_extent() for t in axis.get_xticklabels()]
    assert len(boxes) == 60 and all(a.x1 <= b.x0 for a, b in zip(boxes, boxes[1:], strict=False))
    boxes = sorted((t.get_window_extent() for t in axis.get_yticklabels()), key=lambda b: b.y0)
    assert len(boxes) == 30 and all(a.y1 <= b.y0 for a, b in zip(boxes, boxes[1:], strict=False))
    assert not texts(figure)


def test_maps_that_do_not_fit_are_refused():
    with pytest.raises(SurgeryError, match="2 rows and 1 columns"):
        plots.diverging_map([[1.0, 2.0]], [0, 1], ["a"])
    with pytest.raises(SurgeryError, match="1 to 6 maps, found 7"):
        plots.heat_map({i: [[1.0]] for i in range(7)}, [0], [0])


def test_tokens_are_written_so_that_they_are_seen():
    assert shown(" a\tb\n") == "·a⇥b↵" and shown("\u202e\x00\u00a0é") == "\\u202e\\x00\\xa0é"
    assert tick(" cost $5$") == r"·cost·\$5\$" and tick("resid mid") == "resid mid" and tick("x" * 40) == "x" * 23 + "…"


def test_groups_show_every_value_and_the_quartiles():
    chat, web = np.arange(101.0), [1.0, 2.0, np.nan, 3.0]
    figure = plots.groups({"chat": chat, "web": web}, unit="TuCo", reference=50, reference_label="chance")
    axis = figure.axes[0]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["chat\nn = 101", "web\nn = 3"]
    points = [c.get_offsets() for c in axis.collections]
    np.testing.assert_array_equal(points[0][:, 1], chat)
    assert points[1][:, 1].tolist() == [1, 2, 3]
    box = axis.lines[0].get_ydata()
    assert (min(box), max(box)) == (25, 75) and legend(figure) == ["chance"]
    with pytest.raises(SurgeryError, match="'none' has no finite"):
        plots.groups({"none": [np.nan]}, unit="x")


def test_scatter_has_a_marker_for_each_group():
    figure = plots.scatter([0, 1, 2], [3, 4, 5], ["b", "a", "b"], x_label="PC 1", y_label="PC 2")
    first, second = figure.axes[0].collections
    assert first.get_offsets().tolist() == [[0, 3], [2, 5]] and second.get_offsets().tolist() == [[1, 4]]
    assert len(first.get_paths()[0].vertices) != len(second.get_paths()[0].vertices) and legend(figure) == ["b", "a"]
    with pytest.raises(SurgeryError, match="found 1, 1 and 2"):
        plots.scatter([0], [0], ["a", "b"], x_label="", y_label="")


NODES = {
    "embed": (-1, "input"),
    "a0.h1": (0, "heads"),
    "a0.h2": (0, "heads"),
    "m0": (0.5, "MLP"),
    "logits": (1, "output"),
}


def test_circuit_goes_upwards_with_width_for_size_and_dashes_for_sign():
    edges = {("embed", "a0.h1"): 2.0, ("embed", "a0.h2"): 0.2, ("a0.h1", "logits"): -1.0, ("m0", "logits"): 0.5}
    figure = plots.circuit(NODES, edges, title="found")
    axis = figure.axes[0]
    height = {t.get_text(): t.get_position()[1] for t in axis.texts}
    assert height == {"embed": 0, "a0.h1": 1, "a0.h2": 1, "m0": 2, "logits": 3}
    drawn = axis.patches  # weak ones first
    assert [p.get_linewidth() for p in drawn] == pytest.approx([0.7, 1.15, 1.9, 3.4])
    assert [p.get_alpha() for p in drawn] == sorted(p.get_alpha() for p in drawn)
    assert [p.get_linestyle() == "-" for p in drawn] == [True, True, False, True]
    assert {"input", "heads", "MLP", "output", "score 2", "negative"} <= set(legend(figure))
    looks = {(t.get_bbox_patch().get_facecolor(), t.get_bbox_patch().get_linestyle()) for t in axis.texts}
    assert len(looks) == 4


def test_boxes_of_a_large_circuit_do_not_overlap():
    rng, nodes = np.random.default_rng(0), {"embed": (-1, "input"), "logits": (9, "output")}
    nodes |= {f"a{layer}.h{head}": (layer, "heads") for layer in range(3) for head in range(13)}
    names = list(nodes)
    edges = {(a, b): rng.normal() for a in names for b in names if nodes[a][0] < nodes[b][0] and rng.random() < 0.2}
    figure = plots.circuit(nodes, edges)
    figure.draw_without_rendering()
    boxes = [t.get_bbox_patch().get_window_extent() for t in figure.axes[0].texts]
    assert len(boxes) == 41 and len(edges) > 100
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def test_circuits_that_are_none_are_refused():
    for edge, score, what in [(("embed", "a9.h9"), 1, "'a9.h9', which is no node"), (("m0", "a0.h1"), 1, "backwards"),
                              (("embed", "m0"), np.nan, "score nan")]:  # fmt: skip
        with pytest.raises(SurgeryError, match=what):
            plots.circuit(NODES, {edge: score})
    with pytest.raises(SurgeryError, match="without nodes"):
        plots.circuit({}, {})
