"""Which heads look elsewhere after fine-tuning? Jensen-Shannon divergence of attention patterns, by layer and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from analysis.diff.per_token import Texts
from analysis.prompts import Progress
from analysis.results import Result
from analysis.similarity import attention_js
from surgery.activations import run
from surgery.activations.interventions import unwrapped
from surgery.anatomy import Site, anatomy_of
from surgery.errors import SurgeryError
from surgery.models import Batch, Pair, encode

BUDGET = 2**27
"""Numbers of the base's patterns that are held at a time (512 MB in float32)."""


def pattern_divergence(
    pair: Pair,
    texts: Any,
    *,
    max_tokens: int = 1024,
    batch_size: int = 8,
    budget: int = BUDGET,
    progress: Progress | None = None,
) -> Result:
    """JS in nats (0 to log 2) of both models' attention, (example, layer, head): the mean over queries.

    The first token looks at itself alone and is not counted; the mean over examples is that over all queries. Both
    models run with eager attention, and each text once, unless the patterns of one text exceed `budget` numbers: then
    once for every few layers. Raises `SurgeryError` when all texts are of one token.
    """
    base, tuned = unwrapped(pair.base), unwrapped(pair.tuned)
    anatomy, found = anatomy_of(base), Texts.of(pair, texts, max_tokens)
    queries = found.lengths - 1
    if not queries.any():
        raise SurgeryError("Every text is one token, which looks at itself alone.", hint="Give longer texts.")
    sums, done = np.zeros((len(found), anatomy.n_layers, anatomy.n_heads)), 0
    for rows in _batches(found.lengths, batch_size, budget // anatomy.n_heads):
        batch = encode(None, [found.rows[i] for i in rows])
        size = len(rows) * anatomy.n_heads * int(found.lengths[rows].max()) ** 2
        for layers in _split(range(anatomy.n_layers), max(1, budget // size)):
            sites = [Site("pattern", layer) for layer in layers]
            before = run(base, batch, sites, stop=True)[1]
            looks: dict[Any, Any] = {s: _look(sums[:, s.layer], rows, batch, before[s]) for s in sites}
            run(tuned, batch, [Site("resid_post", layers[-1])], edits=looks, stop=True)
        done += len(rows)
        if progress:
            progress(done, len(found))
    axes = {"example": range(len(found)), "layer": range(anatomy.n_layers), "head": range(anatomy.n_heads)}
    result = Result(sums, axes, "attention JS, nats", {"queries": queries.tolist()})
    return result.normalized("queries", name=result.name, tolerance=0.0)


def _look(sums: np.ndarray, rows: Sequence[int], batch: Batch, before: Tensor) -> Callable[[Tensor], None]:
    """An edit that changes nothing: it notes how far the tuned model's pattern is from the base's, (example, head)."""

    def look(pattern: Tensor) -> None:
        each = attention_js(pattern, before.to(pattern.device), batch.mask.to(pattern.device)[:, None])
        sums[rows] = each.sum(-1).cpu().numpy()  # over queries: 0 where nothing is real

    return look


def _batches(lengths: np.ndarray, most: int, budget: int) -> Iterator[list[int]]:
    """Rows of similar length, longest first: at most `most`, and at most `budget` numbers of rows * longest²."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        size = max(1, min(most, budget // int(lengths[order[0]]) ** 2))
        yield order[:size]
        order = order[size:]


def _split(layers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (layers[i : i + size] for i in range(0, len(layers), size))
