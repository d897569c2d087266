"""Scores of edges: the strongest, the circuit that they make, a table, a picture, a file."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from analysis import result_files
from analysis.edges.graph import Edge, Graph
from analysis.results import Result
from surgery.errors import SurgeryError
from surgery.registry import Registry

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Selection = Literal["top", "greedy"]
Scored = tuple[str, str, float]
"""Writer, reader, mean score."""


@dataclass(frozen=True, eq=False)
class EdgeScores:
    """One score an edge and example, or only the mean over examples; 0 where there is no edge."""

    values: np.ndarray
    """(examples, readers, writers) float32; one example, the mean, when single ones were not kept."""
    graph: Graph
    columns: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """The metric of each example in both runs: clean, corrupt."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """How it was made: method, direction, metric, model; examples; forwards and backwards a batch."""

    def __post_init__(self) -> None:
        shape = (len(self.graph.readers), len(self.graph.writers))
        if self.values.ndim != 3 or self.values.shape[1:] != shape:
            raise SurgeryError(f"Edge scores are (examples, readers, writers), {shape} for this graph, and these have "
                               f"shape {self.values.shape}.")  # fmt: skip

    @property
    def mean(self) -> np.ndarray:
        """(readers, writers) mean over the examples."""
        return self.values.mean(0, dtype=np.float64)

    @property
    def per_example(self) -> bool:
        """Whether scores of single examples were kept."""
        return len(self.values) == self.meta.get("examples", len(self.values))

    def result(self) -> Result:
        """As a `Result` (example, reader, writer), NaN where there is no edge: intervals and tests an edge.

        Raises `SurgeryError` when only means were kept.
        """
        if not self.per_example:
            raise SurgeryError("Only the mean over examples was kept of these scores.",
                               hint="eap(..., per_example=True), or a larger budget.")  # fmt: skip
        values = np.where(self.graph.exists, self.values.astype(np.float64), np.nan)
        axes = {"example": range(len(values)), "reader": self.graph.readers, "writer": self.graph.writers}
        name = f"attributed effect on {self.meta.get('metric', 'metric')}"
        return Result(values, axes, name, self.columns, {**self.meta, "centre": 0})

    def by_writer(self) -> dict[str, float]:
        """Each writer's edges summed: the first-order effect of patching all that it writes."""
        return dict(zip(self.graph.writers, self.mean.sum(0).tolist(), strict=True))

    # ---- selection

    def top(self, n: int = 20, *, absolute: bool = True) -> list[Scored]:
        """The n edges with the greatest mean score (or size of it), the greatest first."""
        mean = self.mean
        key = np.where(self.graph.exists, np.abs(mean) if absolute else mean, -np.inf)
        order = np.argsort(-key, axis=None, kind="stable")[: max(0, min(n, self.graph.n_edges))]
        return [self._edge(*divmod(int(i), len(self.graph.writers)), mean) for i in order]

    def circuit(
        self,
        *,
        n: int | None = None,
        threshold: float | None = None,
        method: Selection = "top",
        absolute: bool = True,
    ) -> list[Scored]:
        """The circuit of the n best edges, or of all whose score (its size, if `absolute`) reaches a threshold.

        "top" takes them from all edges; "greedy" grows from the logits: always the best edge into what is in already
        (Hanna et al. 2024). Edges that lie on no path from `embed` to `logits` are left out, so that fewer than n may
        stay. Raises `SurgeryError` unless one of n and threshold is given, and for more edges than there are.
        """
        if (n is None) == (threshold is None):
            raise SurgeryError("A circuit is cut by a number of edges or by a threshold: give one of n and threshold.")
        if n is not None and not 0 <= n <= self.graph.n_edges:
            raise SurgeryError(f"n={n}: this graph has {self.graph.n_edges} edges.")
        chosen = _SELECTIONS.lookup(method)(self, n, threshold, absolute)
        return self.graph.pruned(chosen)

    def _edge(self, row: int, column: int, mean: np.ndarray) -> Scored:
        return self.graph.writers[column], self.graph.readers[row], float(mean[row, column])

    # ---- out

    def __str__(self) -> str:
        made = ", ".join(str(self.meta[name]) for name in ("method", "direction", "metric") if name in self.meta)
        return f"scores of {self.graph.n_edges} edges ({made}), {self.meta.get('examples', len(self.values))} examples"

    def to_dataframe(self) -> pd.DataFrame:
        """One row an edge: writer, reader, score, and its standard error when examples were kept; greatest first."""
        import pandas as pd

        edges = self.top(self.graph.n_edges)
        frame = pd.DataFrame(edges, columns=["writer", "reader", "score"])
        if self.per_example and len(self.values) > 1:
            error = self.values.std(0, ddof=1, dtype=np.float64) / np.sqrt(len(self.values))
            frame["standard_error"] = [error[self.graph.place(w, r)] for w, r, _ in edges]
        return frame

    def plot(self, circuit: int | Sequence[Edge] | None = None, *, title: str = "") -> Figure:
        """A map of the summed sizes by layers; or, of the best edges or those that are given, the circuit drawn."""
        from analysis.circuit_figure import circuit as draw
        from analysis.maps import heat_map

        if circuit is not None:
            edges = self.circuit(n=circuit) if isinstance(circuit, int) else list(circuit)
            return draw(self.graph.nodes(edges), self.graph.drawn(edges), title=title)
        rows, groups = _groups(self.graph.readers)
        columns, writers = _groups(self.graph.writers)
        size = np.abs(self.mean)
        values = np.full((len(rows), len(columns)), np.nan)
        for i, own in enumerate(groups):
            for j, theirs in enumerate(writers):
                if self.graph.exists[np.ix_(own, theirs)].any():
                    values[i, j] = size[np.ix_(own, theirs)].sum()
        # The logits on top, the embedding at the left: a row reads what stands in its columns.
        return heat_map(values[::-1], rows[::-1], columns, title=title, unit="sum of |score|",
                        row_label="reader", column_label="writer")  # fmt: skip

    def save(self, path: str | Path) -> Path:
        """Write `path`.safetensors (the scores) and `path`.json (all else); returns the JSON's path."""
        labels = range(len(self.values)) if self.per_example else ["mean"]
        axes = {"example": list(labels), "reader": self.graph.readers, "writer": self.graph.writers}
        text = {"name": "edge scores", "axes": axes, "columns": {k: list(v) for k, v in self.columns.items()},
                "meta": {**self.meta, "graph": self.graph.plain}}  # fmt: skip
        return result_files.write(path, self.values, text)

    @classmethod
    def load(cls, path: str | Path) -> EdgeScores:
        """Read what `save` wrote. Raises `SurgeryError` when a file is missing or holds no edge scores."""
        values, text = result_files.read(path)
        meta = dict(text["meta"])
        if "graph" not in meta:
            raise SurgeryError(f"{path} holds no edge scores: nothing says which graph they are of.")
        return cls(values, Graph(**meta.pop("graph")), text["columns"], meta)


_SELECTIONS: Registry[Any] = Registry("way to select edges")


@_SELECTIONS.register("top")
def _top(scores: EdgeScores, n: int | None, threshold: float | None, absolute: bool) -> list[Scored]:
    if n is not None:
        return scores.top(n, absolute=absolute)
    assert threshold is not None
    return [e for e in scores.top(scores.graph.n_edges, absolute=absolute) if _size(e[2], absolute) >= threshold]


@_SELECTIONS.register("greedy")
def _greedy(scores: EdgeScores, n: int | None, threshold: float | None, absolute: bool) -> list[Scored]:
    """Grows from the logits: the best of all edges into readers that are in, until n are or none reaches the bar."""
    graph, mean = scores.graph, scores.mean
    chosen: list[Scored] = []
    waiting: list[tuple[float, int, int]] = []
    open_readers: set[str] = set()

    def enter(readers: Sequence[str]) -> None:
        for reader in readers:
            if reader not in open_readers:
                open_readers.add(reader)
                row = graph.readers.index(reader)
                for column in np.flatnonzero(graph.exists[row]).tolist():
                    heapq.heappush(waiting, (-_size(mean[row, column], absolute), row, column))

    enter(["logits"])
    while waiting and (n is None or len(chosen) < n):
        size, row, column = heapq.heappop(waiting)
        if threshold is not None and -size < threshold:
            break
        chosen.append(scores._edge(row, column, mean))
        enter(graph.reading[graph.writers[column]])
    return chosen


def _size(score: float, absolute: bool) -> float:
    return abs(score) if absolute else score


def _groups(names: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """Names without heads, in order, and where each is: `q 3`, `heads 3`, `mlp 3`."""
    words = {"z": "heads", "mlp_out": "mlp", "mlp_in": "mlp"}
    found: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        kind, *layer = name.split(".")[:2]
        found.setdefault(" ".join([words.get(kind, kind), *layer]), []).append(i)
    return list(found), list(found.values())
