"""What edge attribution costs on a machine: passes, and time in plain forwards, beside one forward an edge."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from analysis.edges.attribution_patching import eap
from analysis.edges.gradients import pairs, passed
from analysis.edges.graph import Graph
from analysis.edges.passes import evaluate_edges
from analysis.metrics import Metric, as_metric
from surgery.activations.interventions import unwrapped


def costs(
    model: Any,
    clean: Any,
    corrupt: Any,
    metric: Metric | Callable[[Tensor], Tensor],
    methods: Sequence[str] = ("eap", "clean-corrupted", "eap-ig-inputs"),
    *,
    steps: int = 5,
    repeats: int = 3,
    tokenizer: Any = None,
) -> list[dict[str, Any]]:
    """One row a method, and one for `evaluate_edges` of a circuit of 100 edges: passes over all prompts, and time.

    `in_forwards` is the least processor time of some repeats over that of a plain forward of the same prompts, and
    `edge_loop` how many forwards the same table would take with one edge patched at a time.
    """
    model = unwrapped(model)
    good, bad = pairs(clean, corrupt, tokenizer, model.device)
    metric = as_metric(metric).to(model.device)
    one = _least(lambda: passed(model, good, metric), repeats)[0]
    edges, rows = Graph.of(model).n_edges, []
    for method in methods:
        seconds, scores = _least(lambda: eap(model, good, bad, metric, method=method, steps=steps), repeats)  # noqa: B023
        rows.append({"method": method, **{name: scores.meta[name] for name in ("forwards", "backwards")},
                     "seconds": seconds, "in_forwards": seconds / one, "edge_loop": edges + 1})  # fmt: skip
    circuit = eap(model, good, bad, metric).circuit(n=min(100, edges))
    seconds, _ = _least(lambda: evaluate_edges(model, good, bad, metric, circuit), repeats)
    return [*rows, {"method": "evaluate_edges", "forwards": 3, "backwards": 0, "seconds": seconds,
                    "in_forwards": seconds / one, "edge_loop": 1}]  # fmt: skip


def _least(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The least processor time of some repeats, after one that warms up, and what came out."""
    found, times = work(), []
    for _ in range(repeats):
        begin = time.process_time()
        found = work()
        times.append(time.process_time() - begin)
    return min(times), found
