"""A circuit as a layered graph: input at the bottom, logits on top, and in between what reads from what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Patch

from analysis.style import blank, tick
from surgery.errors import SurgeryError

FACES: list[tuple[str, Any]] = [
    ("white", "-"),
    ("0.8", "-"),
    ("white", "--"),
    ("0.55", "-"),
    ("0.9", ":"),
    ("0.68", "--"),
]
"""Lightness and outline of a group's boxes."""
WIDEST = 12
"""Nodes side by side; a longer row is broken into several."""
POSITIVE, NEGATIVE = "#123f73", "#9c1c2e"
Place = tuple[float, float]


def circuit(
    nodes: Mapping[str, tuple[float, str]],
    edges: Mapping[tuple[str, str], float],
    *,
    title: str = "",
    unit: str = "score",
) -> Figure:
    """A circuit: `nodes` {name: (layer, group)} in rows by layer, `edges` {(sender, receiver): score} between them.

    The width and darkness of an edge are its |score| against the greatest, a dashed one is negative; weak ones are
    drawn first and fade. Give what comes before (the embedding) the lowest layer, the logits the highest, an MLP that
    reads from the heads of its block half a layer more than they. Nodes of a row are put near what they are joined to.
    Raises `SurgeryError` when there are no nodes, or an edge names an unknown node, runs backwards or has no score.
    """
    _check(nodes, edges)
    places, rows = _places(nodes, edges)
    widest = max(sum(y == row for _, y in places.values()) for row in range(rows))
    figure, axis = blank(max(4.5 if len(nodes) <= 12 else 7.0, 1.0 + 0.82 * widest), max(3.0, 1.4 + 0.52 * rows), title)
    axis.set_xlim(0, 1)
    axis.set_ylim(-0.6, rows - 0.4)
    axis.set_axis_off()
    greatest = max((abs(score) for score in edges.values()), default=0.0) or 1.0
    for (sender, receiver), score in sorted(edges.items(), key=lambda edge: abs(edge[1])):
        _edge(axis, places[sender], places[receiver], score / greatest)
    groups = list(dict.fromkeys(group for _, group in nodes.values()))
    for name, (_, group) in nodes.items():
        face, outline = FACES[groups.index(group) % len(FACES)]
        box = {"boxstyle": "round,pad=0.3", "facecolor": face, "linestyle": outline, "edgecolor": "black"}
        axis.text(*places[name], tick(name, 14), ha="center", va="center", fontsize=7, bbox=box, zorder=5)
    _legend(figure, groups, [score / greatest for score in edges.values()], f"{unit} {greatest:.2g}")
    return figure


def _check(nodes: Mapping[str, tuple[float, str]], edges: Mapping[tuple[str, str], float]) -> None:
    if not nodes:
        raise SurgeryError("A circuit without nodes can't be drawn.")
    for (sender, receiver), score in edges.items():
        if unknown := [name for name in (sender, receiver) if name not in nodes]:
            raise SurgeryError(f"The edge from '{sender}' to '{receiver}' names '{unknown[0]}', which is no node.")
        if sender == receiver or nodes[sender][0] > nodes[receiver][0]:
            raise SurgeryError(f"The edge from '{sender}' to '{receiver}' runs backwards: layer {nodes[sender][0]} to "
                               f"{nodes[receiver][0]}.", hint="Edges go from sender to receiver.")  # fmt: skip
        if not np.isfinite(score):
            raise SurgeryError(f"The edge from '{sender}' to '{receiver}' has the score {score}.")


def _places(
    nodes: Mapping[str, tuple[float, str]], edges: Mapping[tuple[str, str], float]
) -> tuple[dict[str, Place], int]:
    """Where each node stands (column, row), and the number of rows."""
    layers = sorted({layer for layer, _ in nodes.values()})
    rows: list[list[str]] = []
    for layer in layers:
        row = [name for name, (at, _) in nodes.items() if at == layer]
        parts = -(-len(row) // WIDEST)
        rows += [row[i::parts] for i in range(parts)]
    joined: dict[str, list[tuple[str, float]]] = {name: [] for name in nodes}
    for (sender, receiver), score in edges.items():
        joined[sender].append((receiver, abs(score)))
        joined[receiver].append((sender, abs(score)))
    across = {name: x for y, row in enumerate(rows) for name, x in zip(row, _spread(row, y, len(rows)), strict=True)}
    for turn in range(8):  # barycentres, up and down in turn (Sugiyama et al. 1981)
        for y in range(len(rows)) if turn % 2 == 0 else reversed(range(len(rows))):
            pull = {name: _middle(joined[name], across, name) for name in rows[y]}
            rows[y].sort(key=lambda name: pull[name])
            across |= dict(zip(rows[y], _spread(rows[y], y, len(rows)), strict=True))
    return {name: (across[name], float(y)) for y, row in enumerate(rows) for name in row}, len(rows)


def _middle(joined: list[tuple[str, float]], across: Mapping[str, float], name: str) -> float:
    """Where a node's neighbours are on average, by the weight of the edges."""
    total = sum(weight for _, weight in joined)
    return sum(across[other] * weight for other, weight in joined) / total if total else across[name]


def _spread(row: list[str], y: int, rows: int) -> np.ndarray:
    """Places of a row's nodes in 0..1: shifted from row to row, so that a line upwards passes between nodes."""
    shift = 0.0 if y in (0, rows - 1) else (-0.22, 0.1, 0.25, -0.06)[y % 4]
    return (np.arange(len(row)) + 0.5 + shift) / len(row)


def _edge(axis: Axes, start: Place, end: Place, strength: float) -> None:
    """A line from sender to receiver; one that passes over other rows is bent around what may stand between."""
    size = abs(strength)
    over = end[1] - start[1]
    bend = 0.0 if over == 1 else (0.08 if start[0] <= end[0] else -0.08) if over else 0.4
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-", connectionstyle=f"arc3,rad={bend}", shrinkA=5, shrinkB=5,
                                   linewidth=0.4 + 3.0 * size, linestyle=(0, (3, 1.5)) if strength < 0 else "-",
                                   color=NEGATIVE if strength < 0 else POSITIVE, alpha=0.1 + 0.8 * size**0.7,
                                   zorder=1 + size))  # fmt: skip


def _legend(figure: Figure, groups: list[str], strengths: list[float], strongest: str) -> None:
    handles: list[Any] = [
        Patch(facecolor=face, edgecolor="black", linestyle=outline, label=tick(group, 30))
        for group, (face, outline) in zip(groups, [FACES[i % len(FACES)] for i in range(len(groups))], strict=True)
        if group
    ]
    if strengths:
        handles.append(Line2D([], [], color="0.2", linewidth=3.4, label=strongest))
        handles.append(Line2D([], [], color="0.2", alpha=0.2, linewidth=0.7, label="a tenth of it"))
    if any(strength < 0 for strength in strengths):
        handles.append(Line2D([], [], color=NEGATIVE, linewidth=1.6, linestyle=(0, (3, 1.5)), label="negative"))
    longest = max((len(handle.get_label()) for handle in handles), default=1) + 7
    columns = max(1, int(12 * figure.get_figwidth() / longest))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
