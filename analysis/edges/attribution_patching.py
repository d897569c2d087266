"""Edge attribution patching: the effect of patching every edge of the residual stream at once, to first order.

    scores = eap(model, clean, corrupt, logit_diff(answers), method="eap-ig-inputs", tokenizer=tokenizer)
    scores.top(20)                                           # (writer, reader, score)
    circuit = scores.circuit(n=100)
    evaluate_edges(model, clean, corrupt, metric, circuit)   # exactly: every other edge patched

For an edge from writer u to reader v, E(u -> v) = <u' - u, dm/d(input of v)>, the input being v's own copy of the
stream before its norm (Syed et al. 2023, arXiv:2310.10348). Methods differ in where the gradient is taken (Hanna et al.
2024, arXiv:2403.17806); what each costs beside the two runs is forwards with a backward:

| method | gradient | cost |
|---|---|---|
| "eap" | at the run that is patched | a backward |
| "clean-corrupted" | mean of those at both runs | two backwards |
| "eap-ig-inputs" | mean over steps of the embeddings from corrupt to clean | steps |
| "eap-ig-activations" | for u: mean over steps of all heads (or the MLP) of its layer | steps * (2 layers + 1) |
| "eap-ig-activations-pooled" | mean over the steps of all layers, as in the authors' code | as much |

"noising" is the authors' direction: the clean run is patched, scores are what the metric would change by when an edge
is corrupted, so that edges that matter are negative for a metric that is high on clean. Steps by the midpoint rule by
default; the authors' are "left" for inputs (corrupt counts, clean doesn't) and "right" for activations.

Gradients are captured behind the projections and pulled back to the readers' inputs; keys and values are read once a
group, whatever the number of query heads. A layer is one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from analysis.edges.gradients import Direction, Passed, Rule, at_a_time, between, one_of, pairs, passed, points_of
from analysis.edges.graph import Block, Graph
from analysis.edges.scores import EdgeScores
from analysis.edges.wiring import Wiring
from analysis.metrics import Metric, as_metric
from analysis.patching.run import BUDGET, Progress
from surgery.activations.interventions import unwrapped
from surgery.anatomy import Site
from surgery.models import Batch, untouched
from surgery.registry import Registry


@dataclass
class Step:
    """One pass whose gradients count."""

    weight: float
    run: str = ""
    """"clean" or "corrupt" for that run as it is; else the patched run with `moved` between the two."""
    moved: Site | None = None
    at: float = 0.0
    writers: slice = field(default_factory=lambda: slice(None))
    """The writers whose edges it counts for."""
    below: bool = True
    """Whether gradients reach below what is moved."""


METHODS: Registry[Callable[[Graph, list[float], str], list[Step]]] = Registry("method of edge attribution")
"""Each gives its passes for a graph, points between corrupt (0) and clean (1), and the run that is patched."""


@METHODS.register("eap")
def _eap(graph: Graph, points: list[float], base: str) -> list[Step]:
    return [Step(1.0, base)]


@METHODS.register("clean-corrupted")
def _clean_corrupted(graph: Graph, points: list[float], base: str) -> list[Step]:
    return [Step(0.5, "clean"), Step(0.5, "corrupt")]


@METHODS.register("eap-ig-inputs")
def _inputs(graph: Graph, points: list[float], base: str) -> list[Step]:
    return [Step(1 / len(points), moved=Site("resid_pre", 0), at=at) for at in points]


@METHODS.register("eap-ig-activations")
def _activations(graph: Graph, points: list[float], base: str) -> list[Step]:
    ways = _ways(graph)
    return [Step(1 / len(points), "", site, at, rows, False) for site, rows in ways for at in points]


@METHODS.register("eap-ig-activations-pooled")
def _pooled(graph: Graph, points: list[float], base: str) -> list[Step]:
    ways = _ways(graph)
    return [Step(1 / len(points) / len(ways), "", site, at) for site, _ in ways for at in points]


def _ways(graph: Graph) -> list[tuple[Site, slice]]:
    """What moves in turn, with the writers that it is made of."""
    found = [(Site("resid_pre", 0), slice(0, 1))]
    for layer in range(graph.n_layers):
        found.append((Site("attn_out", layer), graph.heads(layer)))
        found.append((Site("mlp_out", layer), slice(graph.mlp(layer), graph.mlp(layer) + 1)))
    return found


def eap(
    model: Any,
    clean: Any,
    corrupt: Any,
    metric: Metric | Callable[[Tensor], Tensor],
    *,
    method: str = "eap",
    steps: int = 5,
    rule: Rule = "midpoint",
    direction: Direction = "noising",
    split_groups: bool = False,
    per_example: bool | None = None,
    tokenizer: Any = None,
    budget: int = BUDGET,
    progress: Progress | None = None,
) -> EdgeScores:
    """The score of every edge, (example, reader, writer), for pairs of prompts of equal length.

    `split_groups` tells edges into shared keys and values apart by the query head that reads them. Scores are kept for
    each example if they fit into a quarter of `budget` bytes (or as `per_example` says), else only their mean; passes
    are cut so that the rest of it is enough, down to one example and one position. `steps` and `rule` are those of the
    methods that integrate. `progress(examples done, examples)`.

    Raises `SurgeryError` for unequal lengths, an unknown method, a metric without gradient, and a model in which
    something unnamed stands between stream and projections.
    """
    plan = METHODS.lookup(method)
    one_of("direction", direction, get_args(Direction))
    points = points_of(rule, steps)
    model = unwrapped(model)
    good, bad = pairs(clean, corrupt, tokenizer, model.device)
    metric = as_metric(metric).to(model.device)
    metric.check(len(good))
    wiring = Wiring(model, split_groups)
    graph = wiring.graph
    passes = plan(graph, points, "clean" if direction == "noising" else "corrupt")
    size = len(graph.readers) * len(graph.writers) * 4
    keep = per_example if per_example is not None else size * len(good) <= budget / 4
    shape = (len(graph.readers), len(graph.writers))
    values = np.empty((len(good), *shape), dtype=np.float32) if keep else np.zeros((1, *shape))
    measured: dict[str, list[Tensor]] = {"clean": [], "corrupt": []}
    counts = {"forwards": 0, "backwards": 0}
    step = at_a_time(metric, _examples(wiring, good, budget), len(good))
    for begin in range(0, len(good), step):
        rows = slice(begin, begin + step)
        part = _Part(wiring, good.select(rows), bad.select(rows), metric.select(rows), direction, budget)
        with untouched(model):
            found = part.scores(passes).cpu().numpy()
        if keep:
            values[rows] = found
        else:
            values += found.sum(0, dtype=np.float64) / len(good)
        for name in measured:
            measured[name].append(part.run(name).values)
        counts = {name: max(count, part.counts[name]) for name, count in counts.items()}
        if progress is not None:
            progress(min(begin + step, len(good)), len(good))
    columns = {name: torch.cat(parts).double().cpu().tolist() for name, parts in measured.items()}
    meta = {"kind": "edges", "method": method, "direction": direction, "metric": metric.name, "examples": len(good),
            "model": wiring.anatomy.name, **counts}  # fmt: skip
    if any(one.moved is not None for one in passes):
        meta |= {"steps": steps, "rule": rule}
    return EdgeScores(values.astype(np.float32, copy=False), graph, columns, meta)


class _Part:
    """Some pairs of prompts: their passes, and the products of gradients with what writers differ by."""

    def __init__(
        self, wiring: Wiring, good: Batch, bad: Batch, metric: Metric, direction: Direction, budget: int
    ) -> None:
        self.wiring, self.graph, self.metric, self.budget = wiring, wiring.graph, metric, budget
        self.batches = {"clean": good, "corrupt": bad}
        self.base, self.source = ("clean", "corrupt") if direction == "noising" else ("corrupt", "clean")
        self.runs: dict[str, Passed] = {}
        self.counts = {"forwards": 0, "backwards": 0}
        self._written: tuple[slice, Tensor] | None = None

    def run(self, name: str) -> Passed:
        """The clean or the corrupt run as it is: made once."""
        if name not in self.runs:
            self.runs[name] = self._pass(name, self.wiring.writer_sites())
        return self.runs[name]

    def scores(self, passes: list[Step]) -> Tensor:
        """(batch, reader, writer), zero where there is no edge."""
        graph, batch = self.graph, self.batches["clean"]
        found = torch.zeros(len(batch), len(graph.readers), len(graph.writers), device=batch.ids.device)
        as_they_are = [self._stepped(step, graph.blocks) for step in passes if step.moved is None]
        for step in passes:
            blocks = [block for block in graph.blocks if step.below or block.seen > step.writers.start]
            done = as_they_are.pop(0) if step.moved is None else self._stepped(step, blocks)
            for columns in self._chunks(batch.ids.shape[1]):  # outside: what writers differ by is made once for all
                for block in blocks:
                    self._add(found, block, step, done, columns)
        return found

    def _pass(
        self,
        name: str,
        kept: list[Site],
        wanted: list[Site] | None = None,
        edits: dict[Site, Tensor] | None = None,
        retain: bool = False,
    ) -> Passed:
        self.counts["forwards"] += 1
        self.counts["backwards"] += bool(wanted)
        return passed(
            self.wiring.model, self.batches[name], self.metric, kept, wanted or [], edits=edits, retain=retain
        )

    def _stepped(self, step: Step, blocks: list[Block]) -> Passed:
        """The pass of a step, with gradients at the sites of the readers and the streams that they read."""
        wiring, split = self.wiring, self.graph.split
        wanted = [site for block in blocks for site in wiring.sites(block)]
        layers = [block.layer for block in blocks if block.kind == "attention"]
        if split:
            wanted += [Site("z", layer) for layer in layers]
        streams = list(dict.fromkeys(wiring.stream(block) for block in blocks))
        edits = None
        if step.moved is not None:
            edits = {step.moved: between(self._value("corrupt", step.moved), self._value("clean", step.moved), step.at)}
            if step.below and step.moved.layer is not None and step.moved.name != "resid_pre":
                edits = {Site("resid_pre", 0): self._value(self.base, Site("resid_pre", 0)), **edits}
        name = step.run or self.base
        kept = [*streams, *([] if step.moved is not None else wiring.writer_sites())]
        found = self._pass(name, kept, wanted, edits, split)
        if step.moved is None:
            self.runs.setdefault(name, found)
        if split:
            for layer in layers:
                self._split(found, layer)
            found.live = {}
        return found

    def _value(self, run: str, site: Site) -> Tensor:
        seen = self.run(run).seen
        if site.name != "attn_out":
            return seen[site]
        assert site.layer is not None
        return self.wiring.attention_output(site.layer, seen[Site("z", site.layer)])

    def _split(self, found: Passed, layer: int) -> None:
        """Gradients of keys and values by the query head through which they came: one at a time of every group."""
        anatomy, z = self.wiring.anatomy, Site("z", layer)
        shared = [Site("k", layer), Site("v", layer)]
        parts = []
        for place in range(anatomy.group):
            only = torch.zeros_like(found.gradients[z])
            only[:, :, place :: anatomy.group] = found.gradients[z][:, :, place :: anatomy.group]
            inputs = [found.live[site] for site in shared]
            parts.append(torch.autograd.grad(found.live[z], inputs, only, retain_graph=True))
        for site, gradients in zip(shared, zip(*parts, strict=True), strict=True):
            found.gradients[site] = torch.stack(gradients, 3).flatten(2, 3)

    def _add(self, scores: Tensor, block: Block, step: Step, found: Passed, columns: slice) -> None:
        """Adds the edges into one block at some positions: (reader, pos * d_model) times (pos * d_model, writer)."""
        wiring, first = self.wiring, step.writers.start or 0
        last = min(block.seen, block.seen if step.writers.stop is None else step.writers.stop)
        gradients = [found.gradients[site][:, columns] for site in wiring.sites(block)]
        pulled = wiring.pulled_back(block, gradients, found.seen[wiring.stream(block)][:, columns])
        differences = self._differences(columns)[:, first:last]
        product = torch.bmm(pulled.flatten(2), differences.flatten(2).transpose(1, 2))
        scores[:, block.readers, first:last] += step.weight * product

    def _differences(self, columns: slice) -> Tensor:
        """(batch, writer, pos, d_model) what the other run's writers differ by at some positions; the last is kept."""
        if self._written is None or self._written[0] != columns:
            one, other = self.run(self.source).seen, self.run(self.base).seen
            first = one[Site("resid_pre", 0)][:, columns].float()
            found = first.new_empty(len(first), len(self.graph.writers), *first.shape[1:])
            found[:, 0] = first - other[Site("resid_pre", 0)][:, columns].float()
            for layer in range(self.graph.n_layers):
                z, mlp = Site("z", layer), Site("mlp_out", layer)
                made = self.wiring.difference(layer, one[z][:, columns], other[z][:, columns])
                found[:, self.graph.heads(layer)] = made
                found[:, self.graph.mlp(layer)] = one[mlp][:, columns].float() - other[mlp][:, columns].float()
            self._written = columns, found
        return self._written[1]

    def _chunks(self, length: int) -> Iterator[slice]:
        """Positions at a time, so that writers' differences and a block's gradients keep within half the budget."""
        widest = max(block.readers.stop - block.readers.start for block in self.graph.blocks)
        rows = len(self.graph.writers) + 4 * widest
        each = rows * len(self.batches["clean"]) * self.wiring.anatomy.d_model * 4
        step = max(1, min(length, int(self.budget / 2 / each)))
        return (slice(begin, min(begin + step, length)) for begin in range(0, length, step))


def _examples(wiring: Wiring, batch: Batch, budget: int) -> int:
    """Examples at a time, so that a pass with its graph keeps within a quarter of the budget; one at least."""
    anatomy, width = wiring.anatomy, batch.ids.shape[1]
    heads = (2 * anatomy.n_heads + 2 * anatomy.n_kv_heads) * anatomy.d_head
    mlp = 4 * anatomy.d_model if anatomy.family.down is None else anatomy.d_mlp()
    layer = 12 * anatomy.d_model + 5 * heads + 5 * mlp + 2 * anatomy.n_heads * width
    number = next(wiring.model.parameters()).element_size()
    scores = 4 * len(wiring.graph.readers) * len(wiring.graph.writers)
    return int(budget / 4 / (anatomy.n_layers * layer * width * number + scores))
