"""The figure of sparse deltas that meet: which numbers they share, and whether they move them the same way."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from analysis.maps import write_cells
from analysis.style import INK, MAX_CELLS, blank, tick

if TYPE_CHECKING:
    from surgery.weights.deltas.algebra import Overlap


def overlap_figure(found: Overlap, *, title: str = "Where sparse deltas meet") -> Figure:
    """Two squares of pairs on one scale from 0 to 1: overlap |I1 n I2| / min(K1, K2), and the share moved the same way.

    Above the diagonal of the left one stands what evenly drawn places would share. Cells without a value (no common
    number, or no known sign) are crossed out; the second square is left out where no sign is known.
    """
    n = len(found.labels)
    meeting = np.array(found.matrix("overlap"))
    upper = np.triu_indices(n, 1)
    meeting[upper] = np.array(found.matrix("chance"))[upper]
    panels = {"overlap (upper right: by chance)": meeting}
    if any(pair.signed is not None for pair in found.pairs.values()):
        panels["moved the same way"] = np.array(found.matrix("agreement"))
    labels = [tick(label) for label in found.labels]
    side = 1.9 + 0.6 * n + 0.06 * max(map(len, labels))
    figure, axes = blank(side * len(panels) + 1.0, side, title, columns=len(panels))
    for axis, (name, values) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        image = axis.imshow(values, cmap=INK, vmin=0, vmax=1)
        for row, column in np.argwhere(np.isnan(values)):
            axis.plot([column - 0.3, column + 0.3], [row - 0.3, row + 0.3], color="0.6", linewidth=0.8)
            axis.plot([column - 0.3, column + 0.3], [row + 0.3, row - 0.3], color="0.6", linewidth=0.8)
        if n <= MAX_CELLS:
            write_cells(axis, values, ".2f" if _coarse(values) else ".3f", values > 0.6)
        for edge in range(1, n):
            axis.axhline(edge - 0.5, color="white", linewidth=1)
            axis.axvline(edge - 0.5, color="white", linewidth=1)
        axis.set_title(name, fontsize="small")
        axis.set_xticks(range(n), labels, rotation=30, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(n), labels if axis is np.atleast_1d(axes)[0] else [""] * n)
    figure.colorbar(image, ax=axes, label="share", shrink=0.8)
    return figure


def _coarse(values: np.ndarray) -> bool:
    """Whether two digits tell all cells from zero."""
    return all(math.isnan(v) or v == 0 or v >= 0.01 for v in values.flat)
