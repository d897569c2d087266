"""How a `Result` is drawn: points, a line with intervals, a map, a map a panel, by the number of its axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from analysis.maps import MAX_PANELS, diverging_map, heat_map
from analysis.style import blank, tick
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from analysis.results import Result


def draw(result: Result, by: str | None, title: str) -> Figure:
    """The figure of a result. Raises `SurgeryError` when it has more axes or panels than a page takes."""
    dimensions = result.values.ndim
    if dimensions > 4:
        raise SurgeryError(f"Result '{result.name}' has {dimensions} axes; a figure shows at most 4.",
                           hint="Take `select` or `reduce` of some of them first.")  # fmt: skip
    if dimensions == 4:
        panel, labels = list(result.axes)[1], _ticks(result, list(result.axes)[1])
        if len(labels) > MAX_PANELS:
            raise SurgeryError(f"Result '{result.name}' has {len(labels)} entries on axis '{panel}': a figure shows "
                               f"{MAX_PANELS} panels.", hint=f"Take `select('{panel}', ...)` or `reduce('{panel}')` "
                               "first.")  # fmt: skip
        return _map(result, dict(zip((f"{panel} {label}" for label in labels), result.mean, strict=True)), title)
    if dimensions == 3:
        return _map(result, {"": result.mean}, title)
    return _points(result, by, title)


def _map(result: Result, panels: dict[str, np.ndarray], title: str) -> Figure:
    """Layers from top to bottom; colours from both sides of 0 where the means are on both, or `meta` says centre 0."""
    row, column = list(result.axes)[-2:]
    if column == "layer":
        row, column, panels = column, row, {name: v.T for name, v in panels.items()}
    labels: dict[str, Any] = {"row_label": row, "column_label": column, "unit": result.name, "title": title}
    means = np.array(list(panels.values()))
    both = (means < 0).any() and (means > 0).any()
    values = panels if len(panels) > 1 else next(iter(panels.values()))
    kind = diverging_map if both or result.meta.get("centre") == 0 else heat_map
    return kind(values, _ticks(result, row), _ticks(result, column), **labels)


def _points(result: Result, by: str | None, title: str) -> Figure:
    """Means with intervals: a point each (one a group of column `by`), or a line over the further axis."""
    if result.values.ndim == 2:
        ticks, mean, (low, high) = _ticks(result, list(result.axes)[1]), result.mean, result.interval()
    else:
        groups = result.by(by) if by else {result.name: result}
        ticks, mean = list(groups), np.array([g.mean for g in groups.values()])
        low, high = np.array([g.interval() for g in groups.values()]).T
    names = [tick(t) for t in ticks]
    step = -(-len(names) // 60)
    letters = sum(map(len, names[::step])) + 2 * len(names[::step])
    figure, axis = blank(min(12.0, max(6.0, 1.2 + 0.16 * len(names))), 3.5, title)
    turn = 0 if letters <= 14 * figure.get_figwidth() else 30 if len(names) <= 14 else 90
    spread = np.clip([mean - low, high - mean], 0, None)
    axis.errorbar(range(len(names)), mean, spread, fmt="ko" if result.values.ndim == 1 else "ko-", capsize=3,
                  markersize=4 if len(names) > 20 else 6)  # fmt: skip
    if result.meta.get("centre") == 0:
        axis.axhline(0, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    axis.set_xticks(range(0, len(names), step), names[::step], rotation=turn, fontsize=7 if len(names) > 20 else None)
    axis.set(xlabel=list(result.axes)[1] if result.values.ndim == 2 else "", ylabel=result.name)
    return figure


def _ticks(result: Result, axis: str) -> list[Any]:
    """What is written along an axis: `meta["ticks"]` of it, or its labels."""
    ticks = list(result.meta.get("ticks", {}).get(axis, result.axes[axis]))
    if len(ticks) != len(result.axes[axis]):
        raise SurgeryError(f"Result '{result.name}': meta has {len(ticks)} ticks for axis '{axis}', which has "
                           f"{len(result.axes[axis])} entries.")  # fmt: skip
    return ticks
