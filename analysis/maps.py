"""Maps of cells: a quantity by row (layer) and column (module, head, position), of one sign or of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from analysis.style import INK, MAX_CELLS, SIGNED, blank, tick
from surgery.errors import SurgeryError

FAINT = 0.08
"""Share of the limit below which a negative cell is left without hatching: it is as good as white."""
MAX_PANELS = 6


def heat_map(
    values: Any,
    rows: Sequence[Any],
    columns: Sequence[Any],
    *,
    title: str = "",
    unit: str = "",
    row_label: str = "layer",
    column_label: str = "module",
    form: str = ".2g",
) -> Figure:
    """A quantity by row (layer) and column (module). Dark is much; a cell that does not exist (NaN) is crossed out.

    `values` (rows, columns); several of them by name make one panel each, on one scale.
    """
    panels = _panels(values, rows, columns)
    finite = np.concatenate([v[np.isfinite(v)] for v in panels.values()])
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    if 0 <= low < 0.5 * high:
        low = 0.0  # an honest scale, unless everything is much the same
    figure, axes = _frame(panels, rows, columns, title, row_label, column_label)
    for axis, v in zip(axes, panels.values(), strict=True):
        image = axis.imshow(v, aspect="auto", cmap=INK, vmin=low, vmax=high if high > low else low + 1)
        _cross_out(axis, v)
        if _numbered(v, len(panels)):
            write_cells(axis, v, form, v > low + 0.6 * (high - low))
    figure.colorbar(image, ax=axes, label=unit, aspect=30)
    return figure


def diverging_map(
    values: Any,
    rows: Sequence[Any],
    columns: Sequence[Any],
    *,
    title: str = "",
    unit: str = "",
    row_label: str = "layer",
    column_label: str = "position",
    form: str = ".2f",
    limit: float | None = None,
) -> Figure:
    """A quantity of either sign by row and column: white at 0, blue above, red below, limits alike on both sides.

    Negative cells are hatched, so that the sign is there without colour; a cell that does not exist (NaN) is crossed
    out, an infinite one has the darkest colour. The first row is on top. `values` (rows, columns); several of them by
    name make one panel each, on one scale. `limit` is the value of the darkest colour (else the greatest finite one).
    """
    panels = _panels(values, rows, columns)
    finite = np.concatenate([abs(v[np.isfinite(v)]) for v in panels.values()])
    limit = limit or float(finite.max(initial=0.0)) or 1.0
    figure, axes = _frame(panels, rows, columns, title, row_label, column_label)
    hatched = False
    for axis, v in zip(axes, panels.values(), strict=True):
        capped = np.clip(v, -limit, limit)
        image = axis.imshow(capped, aspect="auto", cmap=SIGNED, vmin=-limit, vmax=limit)
        _cross_out(axis, v)
        small, behind = max(v.shape) > MAX_CELLS, {}
        for row, column in np.argwhere(capped < -FAINT * limit):
            hatched, behind[row, column] = True, image.to_rgba(capped[row, column])
            ink = "0.72" if capped[row, column] > -0.3 * limit else "0.97"  # no louder than the colour
            axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="/////" if small else "///",
                                     edgecolor=ink, linewidth=0))  # fmt: skip
        if _numbered(v, len(panels)):
            write_cells(axis, v, form, abs(capped) > 0.55 * limit, behind)
    figure.colorbar(image, ax=axes, label=f"{unit} (hatched: negative)".strip() if hatched else unit, aspect=30)
    return figure


def write_cells(
    axis: Axes, values: np.ndarray, form: str, dark: np.ndarray, behind: Mapping[tuple[int, int], Any] | None = None
) -> None:
    """Writes every number into its cell, white where it is dark; `behind` gives a colour that covers the hatching."""
    size, behind = 8 if values.shape[1] <= 12 else 6.5, behind or {}
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            text = format(value, form)
            text = text.lstrip("-") if not float(text) else text  # no "-0.00"
            cover = {"facecolor": behind[row, column], "linewidth": 0, "pad": 0.8} if (row, column) in behind else None
            axis.text(column, row, text, ha="center", va="center", fontsize=size,
                      color="white" if dark[row, column] else "black", bbox=cover)  # fmt: skip


def _panels(values: Any, rows: Sequence[Any], columns: Sequence[Any]) -> dict[str, np.ndarray]:
    """One array or several by name, as arrays whose shape is that of the labels."""
    given = values if isinstance(values, Mapping) else {"": values}
    panels = {str(name): np.asarray(v, dtype=float) for name, v in given.items()}
    if not 0 < len(panels) <= MAX_PANELS:
        raise SurgeryError(f"A figure shows 1 to {MAX_PANELS} maps, found {len(panels)}.", hint="Draw a part of them.")
    for v in panels.values():
        if v.shape != (len(rows), len(columns)) or not v.size:
            raise SurgeryError(f"A map of {len(rows)} rows and {len(columns)} columns can't show values of {v.shape}.")
    return panels


def _frame(
    panels: Mapping[str, np.ndarray], rows: Sequence[Any], columns: Sequence[Any], title: str, row_label: str,
    column_label: str,
) -> tuple[Figure, list[Axes]]:  # fmt: skip
    """A figure with an axis for every panel, up to three side by side, each with its labels."""
    names = [tick(c) for c in columns]
    many, longest = len(columns) > 14, max(map(len, names))
    wide = 2.4 + (0.19 if len(columns) > MAX_CELLS else 0.45 if many else 0.75) * min(len(columns), 80)
    high = 1.6 + (0.16 if len(rows) > MAX_CELLS else 0.3) * min(len(rows), 60)
    turn = 90 if longest > 4 and len(columns) > 8 else 45 if len(columns) > 8 and longest > 2 else 0
    if len(panels) > 1:  # a panel needs no numbers that can be read from afar
        wide, high = min(wide, 4.2), min(high, 4.0)
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    figure, grid = blank(wide * across, high * down + (0.06 * longest if turn else 0), title, across, down)
    axes: list[Axes] = list(np.ravel(grid))
    for spare in axes[len(panels) :]:
        spare.remove()
    room = 80 if len(panels) == 1 else 20
    across_step, down_step = -(-len(columns) // room), -(-len(rows) // 40)
    for i, (axis, name) in enumerate(zip(axes, panels, strict=False)):
        axis.set_facecolor("white")
        axis.set_xticks(range(0, len(columns), across_step), names[::across_step], rotation=turn,
                        fontsize=6.5 if many else None)  # fmt: skip
        axis.set_yticks(range(0, len(rows), down_step), [tick(r) for r in rows[::down_step]],
                        fontsize=6.5 if len(rows) > MAX_CELLS else None)  # fmt: skip
        axis.set(xlabel=column_label, ylabel="" if i % across else row_label)
        axis.set_title(name, fontsize="small")
    return figure, axes[: len(panels)]


def _numbered(values: np.ndarray, panels: int) -> bool:
    """Whether the cells have room for their numbers."""
    return max(values.shape) <= MAX_CELLS and (panels == 1 or values.shape[1] <= 7)


def _cross_out(axis: Axes, values: np.ndarray) -> None:
    for row, column in np.argwhere(np.isnan(values)):
        axis.plot([column - 0.5, column + 0.5], [row - 0.5, row + 0.5], color="0.8", linewidth=0.7)
