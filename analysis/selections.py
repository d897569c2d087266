"""What a selection for sparse tuning chose: shares by layer and kind of module, and the places in one matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from analysis.maps import heat_map
from analysis.style import INK, blank
from surgery.anatomy import kind_of, layer_of
from surgery.anatomy.names import KINDS

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from surgery.tuning import Selection

BLOCKS = 96
"""Largest number of cells on a side of `places_map`; larger matrices are averaged over blocks."""


def shares(selection: Selection, model: nn.Module | None = None) -> pd.DataFrame:
    """The share of numbers that may move, by layer (rows; "-" outside layers) and kind of module (columns).

    Of all the model's parameters, or without a model of those with a chosen number in them.
    """
    import pandas as pd

    moving: dict[tuple[str, str], int] = {}
    there: dict[tuple[str, str], int] = {}
    shapes = selection.shapes if model is None else {n: tuple(p.shape) for n, p in model.named_parameters()}
    for name, shape in shapes.items():
        layer = layer_of(name)
        cell = ("-" if layer is None else str(layer), kind_of(name))
        moving[cell] = moving.get(cell, 0) + (selection.counted(name) if name in selection else 0)
        there[cell] = there.get(cell, 0) + math.prod(shape)
    rows = sorted({row for row, _ in there}, key=lambda row: (row == "-", int(row) if row != "-" else 0))
    columns = sorted({column for _, column in there}, key=KINDS.index)
    table = pd.DataFrame(0.0, index=rows, columns=columns)
    for cell, count in moving.items():
        table.loc[cell] = count / there[cell]
    return table.rename_axis(index="layer", columns="kind")


def selection_map(selection: Selection, model: nn.Module | None = None, *, title: str | None = None) -> Figure:
    """`shares` as a map."""
    table = shares(selection, model)
    told = f"{selection.method}: {selection.count:,} of {selection.total:,} numbers" if title is None else title
    return heat_map(100 * table.to_numpy(), list(table.index), list(table.columns), title=told, unit="% that moves",
                    column_label="kind of module", form=".3g")  # fmt: skip


def places_map(selections: Mapping[str, Selection], name: str, *, title: str | None = None) -> Figure:
    """Where in the matrix `name` the chosen numbers are, one panel a selection: share by block of rows and columns.

    Darker is more; each panel says its share and the least part of rows that holds half of the chosen numbers, which is
    one half for evenly spread ones.
    """
    figure, axes = blank(3.4 * len(selections), 3.3, title or name, columns=len(selections))
    for axis, (label, selection) in zip(np.atleast_1d(axes), selections.items(), strict=True):
        rows, columns = next(s.shapes[name] for s in selections.values() if name in s)
        mask: np.ndarray = np.zeros(rows * columns)
        mask[selection.flat(name).cpu().numpy()] = 1
        mask = mask.reshape(rows, columns)
        axis.imshow(_blocks(mask), cmap=INK, aspect="auto", interpolation="nearest", extent=(0, columns, rows, 0))
        by_row = np.sort(mask.sum(1))[::-1].cumsum()
        half = (int(np.searchsorted(by_row, by_row[-1] / 2)) + 1) / rows if by_row[-1] else math.nan
        axis.set_title(f"{label}: {mask.mean():.1%}\nhalf of them in {half:.0%} of the rows", fontsize="small")
        axis.set(xlabel="input", ylabel="output" if axis is np.atleast_1d(axes)[0] else "")
    return figure


def _blocks(mask: np.ndarray) -> np.ndarray:
    """Means over blocks, at most `BLOCKS` on a side."""
    for side in (0, 1):
        width = math.ceil(mask.shape[side] / BLOCKS)
        starts = np.arange(0, mask.shape[side], width)
        sizes = np.diff(np.append(starts, mask.shape[side]))
        mask = np.add.reduceat(mask, starts, axis=side) / np.expand_dims(sizes, 1 - side)
    return mask
