"""Figures that read in black and white: markers, hatching and numbers in cells carry what colour carries as well.

Every function takes plain arrays and returns a matplotlib `Figure` that belongs to no window and no pyplot state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from analysis.circuit_figure import circuit as circuit
from analysis.maps import diverging_map as diverging_map
from analysis.maps import heat_map as heat_map
from analysis.maps import write_cells
from analysis.style import COLOURS, DASHES, GREYS, HATCHES, INK, MARKERS, MAX_CELLS, bare, blank, legend_below, tick
from surgery.errors import SurgeryError


def save(figure: Figure, path: str | Path, *, dpi: int = 150) -> Path:
    """Writes a figure as the type of `path`'s suffix (png, svg, pdf), making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    return path


def matrix(
    values: np.ndarray, labels: Sequence[str], *, title: str = "Cosine of task vectors", unit: str = "cosine",
    form: str = ".2f",
) -> Figure:  # fmt: skip
    """A square of pairs (cosines, conflicts, overlaps) with every number written out; negative ones are hatched."""
    values = np.asarray(values, dtype=float)
    side = 1.8 + 0.65 * len(labels)
    figure, axis = blank(side + 1.0, side, title)
    image = axis.imshow(abs(values), cmap=INK, vmin=0, vmax=1)
    negative = np.argwhere(np.round(values, 2) < 0)
    for row, column in negative:
        corner = column - 0.5, row - 0.5
        axis.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="///", edgecolor="0.75", linewidth=0))
    if len(labels) <= MAX_CELLS:
        write_cells(axis, values, form, abs(values) > 0.6)
    axis.set_xticks(range(len(labels)), labels, rotation=30, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(labels)), labels)
    figure.colorbar(image, label=f"|{unit}|, hatched: negative" if len(negative) else unit, shrink=0.8)
    return figure


def spectrum(values: Mapping[str, np.ndarray], *, title: str = "Spectrum", energy: float = 0.9) -> Figure:
    """Singular values by rank (left, log scale) and the share of ||d||² held by the first r (right).

    The mark on a curve is the rank that holds the share `energy`.
    """
    figure, (left, right) = blank(9, 3.8, title, columns=2)
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
        bare(axis)
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
    figure, axis = blank(max(6.0, 2.5 + 0.45 * (last - first + 1)), 3.8, title)
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
    bare(axis)
    axis.legend(frameon=False, fontsize="small")
    return figure


def bars(
    values: Mapping[str, Sequence[float]], groups: Sequence[Any], *, title: str = "", unit: str = "",
    group_label: str = "layer", reference: float | None = None, reference_label: str = "",
) -> Figure:  # fmt: skip
    """Grouped bars with one hatching a series, and a dashed line at `reference` (what chance would give)."""
    figure, axis = blank(max(5.0, 1.8 + 0.22 * len(groups) * max(1, len(values))), 3.6, title)
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
    bare(axis)
    if len(values) > 1 or reference_label:
        legend_below(figure)
    return figure


def intervals(
    series: Mapping[str, tuple[Any, Any, Any]], groups: Sequence[Any], *, y_label: str, group_label: str = "",
    title: str = "",
) -> Figure:  # fmt: skip
    """Shares with their intervals, (mean, low, high) over `groups`: one marker a series, side by side in a group."""
    figure, axis = blank(max(4.0, 1.6 + 0.35 * len(groups) * (1 + len(series))), 3.6, title)
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
    bare(axis)
    legend_below(figure)
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
    figure, axis = blank(6.6, 4.0, title)
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
    bare(axis)
    if len(series) > 1:
        legend_below(figure)
    return figure


def groups(
    values: Mapping[str, Sequence[float]], *, unit: str, group_label: str = "", title: str = "",
    reference: float | None = None, reference_label: str = "",
) -> Figure:  # fmt: skip
    """Two or more sets of numbers side by side: every one as a point, and a box of quartiles (whiskers 5 to 95 %).

    The number of finite values stands under each name. Raises `SurgeryError` when a group has none.
    """
    finite = {label: np.asarray(v, dtype=float).ravel() for label, v in values.items()}
    finite = {label: v[np.isfinite(v)] for label, v in finite.items()}
    if empty := [label for label, v in finite.items() if not v.size] or ([] if finite else ["of any name"]):
        raise SurgeryError(f"Group {empty[0]!r} has no finite values to draw.")
    names = [f"{tick(label)}\nn = {len(v)}" for label, v in finite.items()]
    figure, axis = blank(max(4.0, 1.4 + 1.1 * len(names)), 3.8, title)
    boxes = {"color": "black", "linewidth": 1.1}
    axis.boxplot(list(finite.values()), positions=range(len(names)), widths=0.5, whis=(5, 95), showfliers=False,
                 boxprops=boxes, whiskerprops=boxes, capprops=boxes, medianprops=boxes | {"linewidth": 2.2},
                 manage_ticks=False, zorder=3)  # fmt: skip
    for i, v in enumerate(finite.values()):
        sideways = np.random.default_rng(i).uniform(-0.18, 0.18, size=len(v))
        style: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "s": 22 if len(v) <= 60 else 8, "linewidths": 0.7}
        colour = COLOURS[i % len(COLOURS)]
        style |= {
            "facecolors": "none" if i % 2 else colour,
            "edgecolors": colour,
            "alpha": 0.7 if len(v) <= 200 else 0.3,
        }
        axis.scatter(i + sideways, v, **style)
    if reference is not None:
        axis.axhline(reference, color="black", linestyle="--", linewidth=1, label=reference_label)
        if reference_label:
            legend_below(figure)
    axis.set_xlim(-0.6, len(names) - 0.4)
    axis.set_xticks(range(len(names)), names)
    axis.set(xlabel=group_label, ylabel=unit)
    bare(axis)
    return figure


def scatter(
    x: Sequence[float], y: Sequence[float], labels: Sequence[Any] | None = None, *, x_label: str, y_label: str,
    title: str = "",
) -> Figure:  # fmt: skip
    """Points in a plane (two principal directions), a marker for each group of `labels`; faint lines through 0.

    Raises `SurgeryError` when the three are of different lengths.
    """
    places, heights = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    named = [""] * len(places) if labels is None else list(labels)
    if not len(places) == len(heights) == len(named):
        raise SurgeryError(f"Points need x, y and label: found {len(places)}, {len(heights)} and {len(named)}.")
    figure, axis = blank(5.2, 4.4, title)
    for line in (axis.axhline, axis.axvline):
        line(0, color="0.8", linewidth=0.7, zorder=0)
    size = 30 if len(places) <= 200 else 12
    for i, group in enumerate(dict.fromkeys(named)):
        mine, colour = [name == group for name in named], COLOURS[i % len(COLOURS)]
        style: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "s": size, "edgecolors": colour, "alpha": 0.8}
        style |= {"facecolors": "none" if i % 2 else colour, "linewidths": 0.8, "label": tick(group, 40)}
        axis.scatter(places[mine], heights[mine], **style)
    axis.set(xlabel=x_label, ylabel=y_label)
    axis.spines[["top", "right"]].set_visible(False)
    if labels is not None:
        legend_below(figure)
    return figure
