"""Figures that read in black and white: markers, hatching and numbers in cells carry what colour carries as well.

Every function takes plain arrays and returns a matplotlib `Figure` that belongs to no window and no pyplot state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

MARKERS = "osD^vP*Xd<>"
DASHES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]
HATCHES = ["", "///", "...", "xxx", "\\\\\\", "ooo", "+++", "***"]
GREYS = ["0.15", "0.55", "0.8", "0.35", "0.68", "0.9", "0.25", "0.6"]
COLOURS = ["#003f5c", "#d1495b", "#66a182", "#8d6a9f", "#b07d12", "#00798c", "#5c4742", "#808080"]
"""Of different lightness, so that they stay apart when printed in grey."""

INK = LinearSegmentedColormap.from_list("ink", ["white", "0.2"])
"""Dark is much. Stops short of black, so that a map of equal values is no black block."""

MAX_CELLS = 30
"""Rows and columns up to which the cells of a map carry their numbers."""


def save(figure: Figure, path: str | Path, *, dpi: int = 150) -> Path:
    """Writes a figure as the type of `path`'s suffix (png, svg, pdf), making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    return path


def _blank(width: float, height: float, title: str, subplots: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, subplots)
    if title:
        figure.suptitle(title, fontsize="medium")
    return figure, axes


def _bare(axis: Axes) -> None:
    """Only the two lines that carry a scale, and a faint grid behind the data."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="0.9", linewidth=0.7)
    axis.set_axisbelow(True)


def _legend_below(figure: Figure) -> None:
    """One legend under the axes, where it takes nothing from their width."""
    labels = figure.axes[0].get_legend_handles_labels()[1]
    longest = max(map(len, labels)) + 7
    columns = max(1, min(len(labels), int(12 * figure.get_figwidth() / longest)))
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def _cells(axis: Axes, values: np.ndarray, form: str, dark: np.ndarray) -> None:
    """Writes every number into its cell, white where it is dark."""
    size = 8 if values.shape[1] <= 12 else 6.5
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            text = format(value, form)
            text = text.lstrip("-") if not float(text) else text  # no "-0.00"
            axis.text(column, row, text, ha="center", va="center", fontsize=size,
                      color="white" if dark[row, column] else "black")  # fmt: skip


def heat_map(
    values: np.ndarray,
    rows: Sequence[Any],
    columns: Sequence[Any],
    *,
    title: str = "",
    unit: str = "",
    row_label: str = "layer",
    column_label: str = "module",
    form: str = ".2g",
) -> Figure:
    """A quantity by row (layer) and column (module). Dark is much; a cell that does not exist (NaN) is crossed out."""
    values = np.asarray(values, dtype=float)
    height = 1.6 + 0.3 * min(len(rows), 40)
    figure, axis = _blank(2.4 + 0.75 * len(columns), height, title)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    if 0 <= low < 0.5 * high:
        low = 0.0  # an honest scale, unless everything is much the same
    image = axis.imshow(values, aspect="auto", cmap=INK, vmin=low, vmax=high if high > low else low + 1)
    axis.set_facecolor("white")
    for row, column in np.argwhere(~np.isfinite(values)):
        axis.plot([column - 0.5, column + 0.5], [row - 0.5, row + 0.5], color="0.8", linewidth=0.7)
    if max(len(columns), len(rows)) <= MAX_CELLS:
        _cells(axis, values, form, values > low + 0.6 * (high - low))
    axis.set_xticks(range(len(columns)), [str(c) for c in columns], rotation=45 if len(columns) > 8 else 0)
    step = -(-len(rows) // 40)
    axis.set_yticks(range(0, len(rows), step), [str(r) for r in rows[::step]])
    axis.set(xlabel=column_label, ylabel=row_label)
    figure.colorbar(image, label=unit, aspect=30)
    return figure


def matrix(
    values: np.ndarray, labels: Sequence[str], *, title: str = "Cosine of task vectors", unit: str = "cosine",
    form: str = ".2f",
) -> Figure:  # fmt: skip
    """A square of pairs (cosines, conflicts, overlaps) with every number written out; negative ones are hatched."""
    values = np.asarray(values, dtype=float)
    side = 1.8 + 0.65 * len(labels)
    figure, axis = _blank(side + 1.0, side, title)
    image = axis.imshow(abs(values), cmap=INK, vmin=0, vmax=1)
    negative = np.argwhere(np.round(values, 2) < 0)
    for row, column in negative:
        corner = column - 0.5, row - 0.5
        axis.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="///", edgecolor="0.75", linewidth=0))
    if len(labels) <= MAX_CELLS:
        _cells(axis, values, form, abs(values) > 0.6)
    axis.set_xticks(range(len(labels)), labels, rotation=30, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(labels)), labels)
    figure.colorbar(image, label=f"|{unit}|, hatched: negative" if len(negative) else unit, shrink=0.8)
    return figure


def spectrum(values: Mapping[str, np.ndarray], *, title: str = "Spectrum", energy: float = 0.9) -> Figure:
    """Singular values by rank (left, log scale) and the share of ||d||² held by the first r (right).

    The mark on a curve is the rank that holds the share `energy`.
    """
    figure, (left, right) = _blank(9, 3.8, title, subplots=2)
    for i, (label, s) in enumerate(values.items()):
        s = np.asarray(s, dtype=float)
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
        ranks, held = np.arange(1, len(s) + 1), np.cumsum(s**2) / max((s**2).sum(), np.finfo(float).tiny)
        rank = int(np.searchsorted(held, energy)) + 1 if held[-1] > 0 else 1
        mark = {"marker": MARKERS[i % len(MARKERS)], "markevery": [min(rank, len(s)) - 1], "markersize": 7}
        shown = s > 1e-8 * s[0]
        left.semilogy(ranks[shown], s[shown], label=label, **style)
        right.plot(ranks, held, label=f"{label}: {energy:.0%} at rank {rank}", **style, **mark)
    left.set(xlabel="rank", ylabel="singular value")
    right.set(xlabel="rank", ylabel="share of squared norm", ylim=(0, 1.02))
    for axis in (left, right):
        _bare(axis)
        axis.legend(frameon=False, fontsize="small")
    return figure


def ulp_histogram(counts: Mapping[str, np.ndarray], lowest: int, *, zeros: Mapping[str, float] | None = None,
                  title: str = "Size of the change in units of the last place", dtype: str = "") -> Figure:  # fmt: skip
    """How many numbers change by 2**i to 2**(i+1) ulps of the base, in % of all; the first bin is 2**`lowest`.

    `counts` are shares per bin, `zeros` the share of numbers that do not change at all, drawn apart on the left. Left
    of 1 ulp a change can't be stored in the base's type. Bins of less than 0.05 % at both ends are left out.
    """
    visible = np.flatnonzero(np.max([np.asarray(c) for c in counts.values()], axis=0) > 5e-4)
    first, last = min([*visible[:1], -lowest]), max([*visible[-1:], -lowest])
    figure, axis = _blank(max(6.0, 2.5 + 0.45 * (last - first + 1)), 3.8, title)
    width, places = 0.8 / len(counts), np.arange(first, last + 1) + lowest
    for i, (label, c) in enumerate(counts.items()):
        shift = (i - (len(counts) - 1) / 2) * width
        bars: dict[str, Any] = {"color": "white" if HATCHES[i % 8] else GREYS[0], "hatch": HATCHES[i % len(HATCHES)]}
        bars |= {"edgecolor": "black", "linewidth": 0.6}
        axis.bar(places + shift, 100 * np.asarray(c)[first : last + 1], width, label=label, **bars)
        if zeros is not None:
            axis.bar(places[0] - 2 + shift, 100 * zeros[label], width, **bars)
    ticks = {int(p): f"$2^{{{p}}}$" if p else "1" for p in places}
    if zeros is not None:
        ticks = {int(places[0]) - 2: "none"} | ticks
        axis.axvline(places[0] - 1, color="0.6", linewidth=0.8, linestyle=":")
    axis.axvline(-0.5, color="black", linewidth=1, linestyle="--")
    axis.text(-0.45, 0.98, f"1 ulp{' of ' + dtype if dtype else ''}", transform=axis.get_xaxis_transform(), va="top",
              fontsize="small")  # fmt: skip
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.set(xlabel="|d| / ulp(base), from", ylabel="numbers, % of all")
    _bare(axis)
    axis.legend(frameon=False, fontsize="small")
    return figure


def bars(
    values: Mapping[str, Sequence[float]], groups: Sequence[Any], *, title: str = "", unit: str = "",
    group_label: str = "layer", reference: float | None = None, reference_label: str = "",
) -> Figure:  # fmt: skip
    """Grouped bars with one hatching a series, and a dashed line at `reference` (what chance would give)."""
    figure, axis = _blank(max(5.0, 1.8 + 0.22 * len(groups) * max(1, len(values))), 3.6, title)
    width = 0.8 / max(1, len(values))
    for i, (label, heights) in enumerate(values.items()):
        places = np.arange(len(groups)) + (i - (len(values) - 1) / 2) * width
        hatch = HATCHES[i % len(HATCHES)]
        axis.bar(places, heights, width, label=label, hatch=hatch, color="white" if hatch else GREYS[1],
                 edgecolor="black", linewidth=0.6)  # fmt: skip
    if reference is not None:
        axis.axhline(reference, color="black", linestyle="--", linewidth=1, label=reference_label or None)
    step = -(-len(groups) // 40)
    long = max((len(str(g)) for g in groups), default=0) > 4 and len(groups) > 5
    names = [str(g) for g in groups[::step]]
    axis.set_xticks(range(0, len(groups), step), names, rotation=45 if long else 0, ha="right" if long else "center")
    axis.set(xlabel=group_label, ylabel=unit)
    _bare(axis)
    if len(values) > 1 or reference_label:
        _legend_below(figure)
    return figure


def intervals(
    series: Mapping[str, tuple[Any, Any, Any]], groups: Sequence[Any], *, y_label: str, group_label: str = "",
    title: str = "",
) -> Figure:  # fmt: skip
    """Shares with their intervals, (mean, low, high) over `groups`: one marker a series, side by side in a group."""
    figure, axis = _blank(max(4.0, 1.6 + 0.35 * len(groups) * (1 + len(series))), 3.6, title)
    for i, (label, (mean, low, high)) in enumerate(series.items()):
        places = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * 0.6 / len(series)
        spread = np.clip([np.subtract(mean, low), np.subtract(high, mean)], 0, None)
        axis.errorbar(places, mean, spread, fmt=MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)], label=label,
                      markerfacecolor="white" if i % 2 else None, capsize=3, elinewidth=0.9)  # fmt: skip
    axis.set_xlim(-0.6, len(groups) - 0.4)
    axis.set_ylim(-0.03, 1.03)
    long = sum(len(str(g)) + 2 for g in groups) > 14 * figure.get_figwidth()
    axis.set_xticks(range(len(groups)), [str(g) for g in groups], rotation=45 if long else 0,
                    ha="right" if long else "center")  # fmt: skip
    axis.set(xlabel=group_label, ylabel=y_label)
    _bare(axis)
    _legend_below(figure)
    return figure


def curves(
    x: Sequence[float],
    series: Mapping[str, Any],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    references: Mapping[str, float] | None = None,
    log_x: bool = False,
) -> Figure:
    """Trade-off curves: each of `series` is y, or (y, low, high) with an interval drawn as bars.

    `references` are horizontal lines with a name (the base, the best single model).
    """
    figure, axis = _blank(6.6, 4.0, title)
    places = np.asarray(x, dtype=float)
    for i, (label, y) in enumerate(series.items()):
        style: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "linestyle": DASHES[i % len(DASHES)]}
        style |= {"color": COLOURS[i % len(COLOURS)], "markersize": 5, "label": label, "linewidth": 1.4}
        style |= {"markerfacecolor": "white"} if i % 2 else {}
        if isinstance(y, tuple):
            y, low, high = (np.asarray(part, dtype=float) for part in y)
            spread = np.clip([y - low, high - y], 0, None)
            axis.errorbar(places, y, spread, capsize=2.5, elinewidth=0.8, **style)
        else:
            axis.plot(places, np.asarray(y, dtype=float), **style)
    for label, height in (references or {}).items():
        axis.axhline(height, color="0.35", linewidth=0.9, linestyle=(0, (1, 2)))
        axis.annotate(label, (1.01, height), xycoords=("axes fraction", "data"), va="center", fontsize="small",
                      color="0.25")  # fmt: skip
    if log_x:
        axis.set_xscale("log")
    elif np.all(places == np.round(places)):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel=x_label, ylabel=y_label)
    _bare(axis)
    if len(series) > 1:
        _legend_below(figure)
    return figure
