"""The figure of sparse deltas that meet."""

import torch

from analysis.deltas import overlap_figure
from surgery.weights.deltas.algebra import overlap
from surgery.weights.deltas.entries import Entry
from surgery.weights.deltas.file import SparseDelta


def delta(places, values, mode="add"):
    entry = Entry((10, 10), torch.tensor(places, dtype=torch.int32), torch.tensor(values))
    return SparseDelta({"w": entry}, mode, None, {}, 100, "made by hand")


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_overlap_and_direction_with_chance_above_the_diagonal():
    found = overlap({"a": delta([1, 2, 3, 4], [1.0] * 4), "b$": delta([3, 4], [1.0, -1.0]), "c": delta([9], [1.0])})
    figure = overlap_figure(found)
    left, right, _ = figure.axes
    assert texts(left) == ["1.00", "0.04", "0.04", "1.00", "1.00", "0.02", "0.00", "0.00", "1.00"]
    assert texts(right) == ["1.00", "0.50", "0.50", "1.00", "1.00"]  # c meets nobody: crossed out
    assert len(right.lines) - len(left.lines) == 2 * 4
    assert [label.get_text() for label in left.get_xticklabels()] == ["a", "b\\$", "c"]


def test_without_known_directions_there_is_one_square():
    figure = overlap_figure(overlap({"a": delta([1], [1.0], "set"), "b": delta([1], [1.0], "set")}))
    assert len(figure.axes) == 2 and texts(figure.axes[0]) == ["1.00", "0.01", "1.00", "1.00"]
