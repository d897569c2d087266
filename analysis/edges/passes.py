"""What a circuit of edges does by itself: the clean run with every other edge patched to corrupt, exactly.

Every reader reads a copy of the stream of its own. What it reads is the stream of the running pass, less what the
writers of its patched edges differ by from the corrupt run; writers are those of the running pass, so that patches act
on each other as they would in the model. With all edges in, that is the clean run; with none, the corrupt one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.edges.gradients import Passed, at_a_time, pairs, passed
from analysis.edges.graph import Block, Edge
from analysis.edges.wiring import Wiring
from analysis.metrics import Metric, as_metric
from analysis.patching.run import BUDGET, Progress
from analysis.results import Result
from surgery.activations.interventions import unwrapped
from surgery.anatomy import Site
from surgery.errors import SurgeryError
from surgery.models import Batch, untouched

Circuits = Sequence[Edge] | Mapping[str, Sequence[Edge]]


def evaluate_edges(
    model: Any,
    clean: Any,
    corrupt: Any,
    metric: Metric | Callable[[Tensor], Tensor],
    edges: Circuits,
    *,
    tokenizer: Any = None,
    budget: int = BUDGET,
    progress: Progress | None = None,
) -> Result:
    """The metric of each example with all edges outside the circuit patched to corrupt, (example,).

    `edges` are (writer, reader) or (writer, reader, score); several circuits by name give (example, circuit) at one
    forward a circuit, and one for each of the two runs. Columns `clean`, `corrupt` and `span` hold the metric of both:
    (mean - corrupt) / span of the means is the faithfulness. Memory keeps within `budget` bytes down to one example.

    Raises `SurgeryError` for unequal lengths, and for an edge that the model's graph has not: of edges scored with
    `split_groups` those into shared keys and values.
    """
    model = unwrapped(model)
    good, bad = pairs(clean, corrupt, tokenizer, model.device)
    metric = as_metric(metric).to(model.device)
    metric.check(len(good))
    wiring = Wiring(model)
    named = edges if isinstance(edges, Mapping) else {"": edges}
    patched = {name: wiring.graph.exists & ~wiring.graph.kept(own) for name, own in named.items()}
    if not patched:
        raise SurgeryError("No circuits to evaluate.")
    step, values = at_a_time(metric, _examples(wiring, good, budget), len(good)), []
    for begin in range(0, len(good), step):
        rows = slice(begin, begin + step)
        values.append(_measured(wiring, good.select(rows), bad.select(rows), metric.select(rows), patched))
        if progress is not None:
            progress(min(begin + step, len(good)), len(good))
    found = torch.cat(values).double().cpu().numpy()  # (example, circuit), corrupt and clean in front
    columns = {"clean": found[:, 1], "corrupt": found[:, 0], "span": found[:, 1] - found[:, 0]}
    axes: dict[str, Any] = {"example": range(len(good))}
    if isinstance(edges, Mapping):
        axes["circuit"] = list(named)
    meta = {"kind": "circuit of edges", "metric": metric.name, "model": wiring.anatomy.name,
            "edges": [len(own) for own in named.values()]}  # fmt: skip
    numbers = {name: column.tolist() for name, column in columns.items()}
    return Result(found[:, 2:] if isinstance(edges, Mapping) else found[:, 2], axes, metric.name, numbers, meta)


def _measured(wiring: Wiring, good: Batch, bad: Batch, metric: Metric, patched: Mapping[str, np.ndarray]) -> Tensor:
    """(batch, 2 + circuits): the metric of the corrupt run, the clean run, and of each circuit."""
    with untouched(wiring.model):
        corrupt = passed(wiring.model, bad, metric, wiring.writer_sites())
        clean = passed(wiring.model, good, metric)
        found = [corrupt.values, clean.values]
        for mask in patched.values():
            edited = _Edited(wiring, corrupt, torch.from_numpy(mask).to(good.ids.device))
            found.append(passed(wiring.model, good, metric, functions=edited.functions()).values)
    return torch.stack(found, 1)


class _Edited:
    """A pass that rebuilds the input of every reader with patched edges."""

    def __init__(self, wiring: Wiring, corrupt: Passed, patched: Tensor) -> None:
        self.wiring, self.graph, self.corrupt = wiring, wiring.graph, corrupt.seen
        self.patched = patched
        """(readers, writers) bool."""
        stream = self.corrupt[Site("resid_pre", 0)]
        self.differences = stream.new_zeros(len(stream), len(self.graph.writers), *stream.shape[1:]).float()
        """(batch, writer, pos, d_model) running minus corrupt, as far as the pass has come."""
        self.inputs: dict[Block, tuple[Tensor, Tensor]] = {}

    def functions(self) -> dict[Site, Callable[[Tensor], Tensor | None]]:
        """What to do at which site; the pass goes through them in the order of the model."""
        found: dict[Site, Callable[[Tensor], Tensor | None]] = {}
        for layer in range(self.graph.n_layers):
            found[Site("z", layer)] = self._wrote_heads(layer)
            found[Site("mlp_out", layer)] = self._wrote_mlp(layer)
        found[Site("resid_pre", 0)] = self._wrote_input
        for block in self.graph.blocks:
            if bool(self.patched[block.readers].any()):
                self._rebuild(block, found)
        return found

    # ---- writers

    def _wrote_input(self, value: Tensor) -> None:
        self.differences[:, 0] = value.float() - self.corrupt[Site("resid_pre", 0)].float()

    def _wrote_heads(self, layer: int) -> Callable[[Tensor], None]:
        def note(z: Tensor) -> None:
            made = self.wiring.difference(layer, z, self.corrupt[Site("z", layer)])
            self.differences[:, self.graph.heads(layer)] = made

        return note

    def _wrote_mlp(self, layer: int) -> Callable[[Tensor], None]:
        def note(value: Tensor) -> None:
            self.differences[:, self.graph.mlp(layer)] = value.float() - self.corrupt[Site("mlp_out", layer)].float()

        return note

    # ---- readers

    def _rebuild(self, block: Block, found: dict[Site, Callable[[Tensor], Tensor | None]]) -> None:
        stream, sites = self.wiring.stream(block), self.wiring.sites(block)
        if block.kind == "logits":
            found[stream] = lambda value: self._copies(block, value)[0][:, 0]
            return
        first, note = found.get(stream), self._reads(block)

        def both(value: Tensor) -> None:
            if first is not None:
                first(value)
            note(value)

        found[stream] = both
        if block.kind == "mlp":
            found[sites[0]] = lambda value: self.inputs.pop(block)[0][:, 0]
            return
        start = block.readers.start
        for site, (_, count) in zip(sites, self.graph.projections, strict=True):
            own = slice(start, start + count)
            if bool(self.patched[own].any()):
                found[site] = self._projected(block, site, own)
            start += count

    def _copies(self, block: Block, stream: Tensor) -> tuple[Tensor, Tensor]:
        """What the readers of a block read, (batch, different ones, pos, d_model), and which of them each reader."""
        rows, which = self.patched[block.readers, : block.seen].unique(dim=0, return_inverse=True)
        differences = self.differences[:, : block.seen]
        out = torch.matmul(rows.float(), differences.flatten(2)).unflatten(2, stream.shape[1:])
        return (stream[:, None].float() - out).to(stream.dtype), which

    def _reads(self, block: Block) -> Callable[[Tensor], None]:
        def note(stream: Tensor) -> None:
            copies, which = self._copies(block, stream)
            norm = self.wiring.norm(block)
            self.inputs = {one: read for one, read in self.inputs.items() if one.layer == block.layer}
            self.inputs[block] = (copies if norm is None else norm.forward(copies)), which

        return note

    def _projected(self, block: Block, site: Site, own: slice) -> Callable[[Tensor], Tensor]:
        """q, k or v of the heads with patched edges; others stay as the model has made them."""
        assert site.layer is not None
        layer, touched = site.layer, self.patched[own].any(1)

        def project(value: Tensor) -> Tensor:
            copies, which = self.inputs[block]
            weight, bias = self.wiring.projected(site.name, layer)
            heads = touched.nonzero()[:, 0]
            mine = which[own.start - block.readers.start :][heads]
            made = torch.einsum("bhtd,dhe->bthe", copies[:, mine], weight[:, heads]) + bias[heads]
            value = value.clone()
            value[:, :, heads] = made.to(value.dtype)
            return value

        return project


def _examples(wiring: Wiring, batch: Batch, budget: int) -> int:
    """Examples at a time, so that writers' differences and readers' inputs keep within the budget; one at least."""
    graph, anatomy = wiring.graph, wiring.anatomy
    widest = max(block.readers.stop - block.readers.start for block in graph.blocks)
    rows = len(graph.writers) + 4 * widest + 4 * anatomy.n_layers
    return int(budget / (rows * anatomy.d_model * batch.ids.shape[1] * 4))
