"""Figures of selections, and the shares that they show."""

import pytest

from analysis.selections import places_map, selection_map, shares
from surgery.models import load
from surgery.tuning import select


@pytest.fixture(scope="module")
def model():
    return load("tiny-base")[0]


def test_shares_add_up_to_the_selection(model):
    found = select(model, "magnitude", density=0.05, scope="global")
    table = shares(found)
    assert list(table.index) == ["0", "1", "2", "3"] and list(table.columns) == [
        "q",
        "k",
        "v",
        "o",
        "gate",
        "up",
        "down",
    ]
    sizes = dict.fromkeys("qkvo", 96 * 96) | dict.fromkeys(("gate", "up", "down"), 96 * 256)
    assert sum(sizes[k] * table[k].sum() for k in table) == pytest.approx(found.count)
    half = select(model, "half", seed=1)
    assert shares(half, model)["norm"].tolist() == [0.5, 0.5, 0.5, 0.5, 1.0]
    halves = shares(half)
    assert set(halves.to_numpy().ravel()) == {0.0, 1.0} and halves.index[-1] == "-"


def test_figures_say_what_is_in_them(model):
    lift, name = select(model, "lift", density=0.05), "model.layers.2.mlp.down_proj.weight"
    assert "22,124 of 442,368" in selection_map(lift).get_suptitle()
    figure = places_map({"LIFT": lift, "S2FT": select(model, "s2ft", density=0.05)}, name)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[0].startswith("LIFT: 5.0%") and "in 50% of the rows" in titles[1]
