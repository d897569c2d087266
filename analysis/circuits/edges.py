"""A circuit of edges: who writes and who reads it, with a score each, as a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.circuits.groups import EVERYWHERE, Circuit, Group, Head, Recall
from analysis.edges.graph import Graph
from analysis.result_files import _write
from surgery.anatomy import Site
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class EdgeCircuit:
    """Edges (writer, reader, score) of one model's graph: what `EdgeScores.circuit` chose.

    `evaluate_edges(..., found.edges)` measures it. Raises `SurgeryError` for an edge that the graph has not.
    """

    edges: Sequence[tuple[str, str, float]]
    graph: Graph
    note: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        edges = tuple((str(writer), str(reader), float(score)) for writer, reader, score in self.edges)
        object.__setattr__(self, "edges", edges)
        self.graph.kept(edges)  # refuses what is no edge

    def __len__(self) -> int:
        return len(self.edges)

    def __or__(self, other: EdgeCircuit) -> EdgeCircuit:
        own = self._pairs
        return self._with([*self.edges, *(edge for edge in other.edges if edge[:2] not in own)])

    def __and__(self, other: EdgeCircuit) -> EdgeCircuit:
        return self._with([edge for edge in self.edges if edge[:2] in other._pairs])

    def __sub__(self, other: EdgeCircuit) -> EdgeCircuit:
        return self._with([edge for edge in self.edges if edge[:2] not in other._pairs])

    @property
    def _pairs(self) -> set[tuple[str, str]]:
        return {(writer, reader) for writer, reader, _ in self.edges}

    def _with(self, edges: Sequence[tuple[str, str, float]]) -> EdgeCircuit:
        return EdgeCircuit(edges, self.graph, self.note)

    def recall(self, other: EdgeCircuit) -> Recall:
        """How many of the edges of `other` are here too."""
        return Recall(len(self._pairs & other._pairs), len(other))

    def heads(self) -> Circuit:
        """The heads that write along its edges, as a circuit of one group at all positions."""
        writers = [Site.parse(writer) for writer, _, _ in self.edges if writer.startswith("z.")]
        found = dict.fromkeys(Head(site.layer or 0, site.head or 0) for site in writers)
        return Circuit({"heads": Group(tuple(sorted(found)), EVERYWHERE)}, self.note)

    def plot(self, *, title: str = "") -> Figure:
        """The edges as a layered graph."""
        from analysis.circuit_figure import circuit

        edges: list[Any] = list(self.edges)
        return circuit(self.graph.nodes(edges), self.graph.drawn(edges), title=title or self.note)

    def save(self, path: str | Path) -> Path:
        """Writes it as JSON, an edge a line."""
        path = Path(path)
        lines = ",\n".join(f"  {json.dumps(list(edge))}" for edge in self.edges)
        note, graph = json.dumps(self.note, ensure_ascii=False), json.dumps(self.graph.plain)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, f'{{\n "note": {note},\n "graph": {graph},\n "edges": [\n{lines}\n ]\n}}\n'.encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> EdgeCircuit:
        """Reads what `save` wrote. Raises `SurgeryError` for a missing file, and for what is no circuit of edges."""
        try:
            text = json.loads(Path(path).read_text(encoding="utf-8"))
            graph, edges = Graph(**text["graph"]), [tuple(edge) for edge in text["edges"]]
            return cls(edges, graph, str(text.get("note", "")))
        except FileNotFoundError:
            raise SurgeryError(f"There is no circuit at {path}.") from None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise SurgeryError(f"{path} is not a circuit of edges: {error!r:.200}") from None
