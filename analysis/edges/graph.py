"""The graph of a model's residual stream: who writes, who reads, and which edges lie between.

| writers     | what is added to the stream         | readers              | what reads a copy of it, before its norm  |
|-------------|-------------------------------------|----------------------|-------------------------------------------|
| `embed`     | what enters the first block         | `q.3.2`              | queries of head 2 of layer 3              |
| `z.3.2`     | head 2 of layer 3, projected        | `k.3.0`, `v.3.0`     | keys and values of one key-value head     |
| `mlp_out.3` | the MLP (or all experts) of layer 3 | `mlp_in.3`, `logits` | the MLP of layer 3, the last norm         |

An edge goes from a writer to every later reader; from the heads of a layer to its own MLP too, unless attention and MLP
are parallel. Biases are in no writer: they are the same in any two runs. With `split` keys and values have one reader
for each query head that shares them (`k.3.2`: as head 2 reads them).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from surgery.anatomy import anatomy_of
from surgery.errors import SurgeryError
from surgery.registry import nearest

Edge = tuple[Any, ...]
"""(writer, reader), or (writer, reader, score)."""


@dataclass(frozen=True, eq=False)
class Block:
    """Readers that read one stream together: those of an attention or MLP module, or the last norm."""

    kind: str
    """attention, mlp or logits."""
    layer: int
    readers: slice
    seen: int
    """How many writers came before, in the order of `Graph.writers`."""


@dataclass(frozen=True)
class Graph:
    """Writers, readers and edges by name; rows of a matrix are readers, columns are writers."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool = False
    split: bool = False

    @classmethod
    def of(cls, model: Any, split: bool = False) -> Graph:
        """The graph of a model."""
        a = anatomy_of(model)
        return cls(a.n_layers, a.n_heads, a.n_kv_heads, a.parallel, split)

    @property
    def plain(self) -> dict[str, Any]:
        """All of it as JSON has it: `Graph(**plain)`."""
        return asdict(self)

    @cached_property
    def writers(self) -> list[str]:
        """By layer: embed, heads, MLP, heads, ..."""
        layers = ([*(f"z.{i}.{h}" for h in range(self.n_heads)), f"mlp_out.{i}"] for i in range(self.n_layers))
        return ["embed", *(name for layer in layers for name in layer)]

    @cached_property
    def readers(self) -> list[str]:
        """By layer: q, k, v by head, MLP; logits at the end."""
        found = []
        for layer in range(self.n_layers):
            found += [f"{kind}.{layer}.{head}" for kind, count in self.projections for head in range(count)]
            found.append(f"mlp_in.{layer}")
        return [*found, "logits"]

    @property
    def projections(self) -> list[tuple[str, int]]:
        """q, k and v with the number of readers in a layer."""
        few = self.n_heads if self.split else self.n_kv_heads
        return [("q", self.n_heads), ("k", few), ("v", few)]

    def heads(self, layer: int) -> slice:
        """The heads of a layer among the writers."""
        start = 1 + layer * (self.n_heads + 1)
        return slice(start, start + self.n_heads)

    def mlp(self, layer: int) -> int:
        """The MLP of a layer among the writers."""
        return self.heads(layer).stop

    @cached_property
    def blocks(self) -> list[Block]:
        """The readers in the order of the pass."""
        each, found = sum(count for _, count in self.projections), []
        for layer in range(self.n_layers):
            start, heads = layer * (each + 1), self.heads(layer)
            found.append(Block("attention", layer, slice(start, start + each), heads.start))
            seen = heads.start if self.parallel else heads.stop
            found.append(Block("mlp", layer, slice(start + each, start + each + 1), seen))
        end = len(self.readers) - 1
        return [*found, Block("logits", self.n_layers, slice(end, end + 1), len(self.writers))]

    @cached_property
    def exists(self) -> np.ndarray:
        """(readers, writers) bool: whether there is an edge."""
        found = np.zeros((len(self.readers), len(self.writers)), dtype=bool)
        for block in self.blocks:
            found[block.readers, : block.seen] = True
        return found

    @property
    def n_edges(self) -> int:
        """Edges in all."""
        return int(self.exists.sum())

    @cached_property
    def _reader_of(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.readers)}

    @cached_property
    def _writer_of(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.writers)}

    def place(self, writer: str, reader: str) -> tuple[int, int]:
        """Row and column of an edge. Raises `SurgeryError` for names that are not in the graph, or no edge's."""
        hint = "" if self.split else " Keys and values are read by group: k.LAYER.KEY_VALUE_HEAD."
        for name, known, what in ((writer, self._writer_of, "writer"), (reader, self._reader_of, "reader")):
            if name not in known:
                raise SurgeryError(f"There is no {what} '{name}' in this graph.", hint=nearest(str(name), known) + hint)
        row, column = self._reader_of[reader], self._writer_of[writer]
        if not self.exists[row, column]:
            raise SurgeryError(f"There is no edge from '{writer}' to '{reader}': it does not come later.")
        return row, column

    def kept(self, edges: Iterable[Edge]) -> np.ndarray:
        """(readers, writers) bool: the edges that are named."""
        found = np.zeros_like(self.exists)
        for edge in edges:
            if not isinstance(edge, (tuple, list)) or len(edge) < 2:
                raise SurgeryError(f"An edge is (writer, reader) or (writer, reader, score), and not {edge!r}.")
            found[self.place(edge[0], edge[1])] = True
        return found

    def inside(self, reader: str) -> list[str]:
        """The writers that a reader is a part of: keys are part of every head of their group."""
        kind, _, rest = reader.partition(".")
        if kind == "logits":
            return []
        if kind == "mlp_in":
            return [f"mlp_out.{rest}"]
        layer, head = map(int, rest.split("."))
        if kind == "q" or self.split:
            return [f"z.{layer}.{head}"]
        group = self.n_heads // self.n_kv_heads
        return [f"z.{layer}.{h}" for h in range(head * group, (head + 1) * group)]

    @cached_property
    def reading(self) -> dict[str, list[str]]:
        """For each writer its readers."""
        found: dict[str, list[str]] = {writer: [] for writer in self.writers}
        for reader in self.readers:
            for writer in self.inside(reader):
                found[writer].append(reader)
        return found

    def pruned(self, edges: Sequence[Edge]) -> list[Edge]:
        """Those edges that lie on a path from `embed` to `logits`, in their order."""
        from_embed, to_logits = {"embed"}, {"logits"}
        ordered = sorted(edges, key=lambda edge: self._reader_of[edge[1]])
        for writer, reader, *_ in ordered:
            if writer in from_embed:
                from_embed.update(self.inside(reader))
        for writer, reader, *_ in reversed(ordered):
            if reader in to_logits or any(own in to_logits for own in self.inside(reader)):
                to_logits.add(writer)
        return [
            edge
            for edge in edges
            if edge[0] in from_embed and (edge[1] == "logits" or any(w in to_logits for w in self.inside(edge[1])))
        ]

    def nodes(self, edges: Sequence[Edge]) -> dict[str, tuple[float, str]]:
        """The nodes of a circuit with their height and group, for a drawing: heads are `3.2`, MLPs `mlp 3`."""
        names = {name for edge in edges for name in (edge[0], *self._ends(edge[1], edges))}
        kinds = {"embed": "input", "z": "head", "mlp_out": "MLP", "logits": "output"}
        found = {}
        for name in sorted(names, key=lambda n: self._writer_of.get(n, len(self.writers))):
            kind, _, rest = name.partition(".")
            layer = {"embed": -1, "logits": self.n_layers}.get(kind) or int(rest.partition(".")[0])
            found[_label(name)] = (layer + 0.5 * (kind == "mlp_out" and not self.parallel), kinds[kind])
        return found

    def drawn(self, edges: Sequence[Edge]) -> dict[tuple[str, str], float]:
        """The edges between `nodes`, those into q, k and v of a head as one: the sum of their scores."""
        found: dict[tuple[str, str], float] = {}
        for writer, reader, *score in edges:
            for node in self._ends(reader, edges):
                pair = _label(writer), _label(node)
                found[pair] = found.get(pair, 0.0) + (float(score[0]) if score else 1.0)
        return found

    def _ends(self, reader: str, edges: Sequence[Edge]) -> list[str]:
        """Where an edge ends: of the heads that share a reader those that write in this circuit."""
        inside = self.inside(reader)
        return [w for w in inside if any(w == edge[0] for edge in edges)] or inside or [reader]


def _label(name: str) -> str:
    kind, _, rest = name.partition(".")
    return rest if kind == "z" else f"mlp {rest}" if kind == "mlp_out" else name
