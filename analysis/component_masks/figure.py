"""A component mask as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from analysis.maps import heat_map
from analysis.plots import bars

if TYPE_CHECKING:
    from analysis.component_masks.parts import Part

WIDEST = 80
"""Columns up to which a map shows every component."""


def mask(parts: Sequence[Part], values: np.ndarray, title: str | None = None) -> Figure:
    """How far each component is patched, 1 - w: layers below each other, heads, neurons, directions or sites beside.

    Where a layer has more than 80 of them, bars show how many are selected in each.
    """
    selected = int((np.round(values) == 0).sum())
    title = f"{selected} of {len(values)} components selected" if title is None else title
    ends = np.cumsum([part.size for part in parts])
    of = [values[end - part.size : end] for part, end in zip(parts, ends, strict=True)]
    wholes = all(part.heads is None and part.basis is None for part in parts)
    rows = [part.site.layer if wholes else _named(part, parts) for part in parts]
    columns = [[_named(part, parts, layer=False)] if wholes else list(_numbers(part)) for part in parts]
    kinds = {"direction" if part.basis is not None else part.site.kind for part in parts}
    what = "site" if wholes else "direction" if "direction" in kinds else "neuron" if "neurons" in kinds else "head"
    if max(map(len, columns)) > WIDEST:
        counts = [float((np.round(w) == 0).sum()) for w in of]
        return bars({"selected": counts}, rows, title=title, unit=f"selected {what}s", group_label="site")
    down = list(dict.fromkeys(rows)) if wholes else rows
    across = list(dict.fromkeys(name for names in columns for name in names))
    across = across if wholes else sorted(across)
    found = np.full((len(down), len(across)), np.nan)
    for i, (row, names, w) in enumerate(zip(rows, columns, of, strict=True)):
        found[down.index(row) if wholes else i, [across.index(name) for name in names]] = 1 - w
    return heat_map(found, down, across, title=title, unit="patched, 1 - w", row_label="layer" if wholes else "site",
                    column_label=what)  # fmt: skip


def _named(part: Part, parts: Sequence[Part], layer: bool = True) -> str:
    """The site, with its place where they differ."""
    site = str(part.site) if layer else part.site.name
    alike = len({other.place for other in parts}) == 1
    return site if alike else f"{site}@{'all' if part.place is None else part.place}"


def _numbers(part: Part) -> Sequence[int]:
    return range(part.size) if part.heads is None else part.heads
