"""The figures of a `Geometry`: which of its numbers goes into which plot. A new one is a function and a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from analysis import plots
from analysis.sweep import LOWEST_ULP
from surgery.anatomy import KINDS
from surgery.errors import SurgeryError
from surgery.registry import Registry, nearest

if TYPE_CHECKING:
    from analysis.geometry import Geometry

FIGURES: Registry[Callable[[Geometry, str | None, str], Figure]] = Registry("figure of a geometry")

_UNITS = {
    "relative": "||d|| / ||B||", "l1": "||d||, L1", "l2": "||d||, L2", "linf": "largest |d|",
    "zeros": "share of exact zeros", "kurtosis": "kurtosis (3: normal)", "base_cosine": "cos(base, tuned)",
    "kept_by_trim": "share of norm kept by trimming", "kept_by_election": "share of norm kept by election",
}  # fmt: skip


def _which(found: Geometry, vector: str | None) -> str:
    if vector is not None and vector not in found.labels:
        raise SurgeryError(f"There is no vector '{vector}' in this geometry.", hint=nearest(vector, found.labels))
    return vector or found.labels[0]


@FIGURES.register("heat map")
def _heat_map(found: Geometry, vector: str | None, quantity: str) -> Figure:
    """A quantity of one vector, layer by module; what lies outside layers is in rows of its own."""
    if quantity not in _UNITS:
        raise SurgeryError(f"There is no quantity '{quantity}'.", hint=nearest(quantity, _UNITS))
    label = _which(found, vector)
    cells = [row for row in found.to_dataframe("layer and module").to_dict("records") if row["vector"] == label]
    many = len({row["stack"] for row in cells if _layered(row)}) > 1
    rows = list(dict.fromkeys(_row(row, many) for row in cells))
    modules = [kind for kind in KINDS if any(row["module"] == kind for row in cells)]
    values = np.full((len(rows), len(modules)), np.nan)
    for row in cells:
        values[rows.index(_row(row, many)), modules.index(row["module"])] = row[quantity]
    return plots.heat_map(values, rows, modules, unit=_UNITS[quantity], title=f"{label}: {_UNITS[quantity]}")


def _layered(row: Mapping[Any, Any]) -> bool:
    return isinstance(row["layer"], Integral)


def _row(row: Mapping[Any, Any], many: bool) -> str:
    return (f"{row['stack']}.{row['layer']}" if many else str(row["layer"])) if _layered(row) else "outside"


@FIGURES.register("cosine")
def _cosine(found: Geometry, vector: str | None, quantity: str) -> Figure:
    """Cosines of all pairs over the whole model."""
    return plots.matrix(found.cosine(), found.labels, title=f"Cosine of task vectors on {found.base}")


@FIGURES.register("conflict")
def _conflict(found: Geometry, vector: str | None, quantity: str) -> Figure:
    """Sign conflict of every pair by layer, beside the half that chance gives. At most six pairs are drawn apart."""
    pairs = found.to_dataframe("layer", "pairs")
    if pairs.empty:
        raise SurgeryError("Sign conflict needs two vectors, this geometry has one.")
    pairs = pairs.dropna(subset=["layer"]) if pairs.layer.notna().any() else pairs
    pairs["group"] = [_row(row, pairs["stack"].nunique() > 1) for row in pairs.to_dict("records")]
    groups = list(dict.fromkeys(pairs.group))
    pairs["pair"] = pairs.a + " / " + pairs.b
    if pairs.pair.nunique() > 6:
        pairs["pair"] = "mean of all pairs"
    share = 100 * pairs.pivot_table(index="group", columns="pair", values="sign_conflict", sort=False).loc[groups]
    series = {str(pair): share[pair].to_list() for pair in share}
    title = "Numbers that two vectors move in opposite directions"
    return plots.bars(series, groups, title=title, unit="% of those both move", reference=50, reference_label="chance")


@FIGURES.register("ulps")
def _ulps(found: Geometry, vector: str | None, quantity: str) -> Figure:
    """|d| in units of the last place of the base, of one vector or of all."""
    _, sums = found.groups("total")
    chosen = found.labels if vector is None else [_which(found, vector)]
    counts, zeros = {}, {}
    for label in chosen:
        i = found.labels.index(label)
        untouched = sums["numel"][0] - sums["both"][0, i, i]
        row = sums["ulps"][0, i].copy()
        row[0] -= untouched
        counts[label], zeros[label] = row / sums["numel"][0], untouched / sums["numel"][0]
    return plots.ulp_histogram(counts, LOWEST_ULP, zeros=zeros)


@FIGURES.register("spectrum")
def _spectrum(found: Geometry, vector: str | None, quantity: str) -> Figure:
    """Singular values of every vector in the matrix where they are largest; `quantity` names another tensor."""
    if not found.spectra:
        raise SurgeryError("This geometry holds no spectra.", hint="Measure it with spectra=True.")
    name = quantity if quantity in found.spectra else max(found.spectra, key=lambda n: found.spectra[n][:, 0].max())
    chosen = found.labels if vector is None else [_which(found, vector)]
    values = {label: found.spectra[name][found.labels.index(label)] for label in chosen}
    return plots.spectrum(values, title=name)
