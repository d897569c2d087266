"""From the model to the dictionary: what reading activations costs, and a second dictionary on the same stream.

The model's own forward is that of a copy without the layers above the deepest site, and without its head.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterable, Iterator
from itertools import islice
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn

from surgery.anatomy import anatomy_of
from surgery.models import load
from surgery.sae.activations import Rows, Shuffled, Stream
from surgery.sae.dictionary import Dictionary
from surgery.sae.rules import BatchTopK
from surgery.sae.train import Entry, Settings, fit

Row = dict[str, Any]
MODELS: dict[str, dict[str, Any]] = {
    "tiny-base": {"layer": 2, "shape": (64, 64), "latents": 2048, "k": 16, "reads": 4, "rounds": (11, 5)},
    "smollm2": {"layer": 15, "shape": (4, 128), "latents": 4608, "k": 32, "reads": 1, "rounds": (7, 7)},
}
STEPS = 16
"""Of a fit: as many batches as the scale of activations is estimated on."""


def ratio(over: list[float], under: list[float]) -> Row:
    """The median over rounds of one over another, and between what."""
    each = [a / b for a, b in zip(over, under, strict=True)]
    return {"ratio": statistics.median(each), "range": [min(each), max(each)]}


def cut(model: Any, layer: int) -> nn.Module:
    """The body of a copy without the layers above: what transformers itself computes up to there."""
    body = copy.deepcopy(model.model)
    body.layers = body.layers[: layer + 1]
    body.norm = nn.Identity()
    return body


class Timed:
    """Batches, and the CPU seconds that waiting for them took."""

    def __init__(self, batches: Iterable[Rows]) -> None:
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> Iterator[Rows]:
        source = iter(self.batches)
        while True:
            began = process_time()
            rows = next(source, None)
            self.seconds += process_time() - began
            if rows is None:
                return
            yield rows


def stream(name: str, fast: bool = False) -> Row:
    """Reading against the bare forward; then fits of one dictionary, of two, and of one on rows that are there."""
    about = MODELS[name] | ({"shape": (8, 16), "latents": 128, "reads": 2, "rounds": (1, 1)} if fast else {})
    model, _ = load(name, dtype="float32")
    rounds = about["rounds"]
    site, shape = f"resid_post.{about['layer']}", about["shape"]
    generator = torch.Generator().manual_seed(0)
    vocabulary = anatomy_of(model).embed.weight.shape[0]
    ids = [torch.randint(0, vocabulary, shape, generator=generator) for _ in range(STEPS + 4)]
    body, seconds = cut(model, about["layer"]), {"forward": [], "reading": []}  # type: ignore[var-annotated]
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    for turn in range(rounds[0] + 1):
        for what in ("forward", "reading"):
            began = process_time()
            if what == "forward":
                with torch.no_grad():
                    for each in ids[: about["reads"]]:
                        body(input_ids=each, attention_mask=torch.ones_like(each), use_cache=False)
            else:
                for _ in Stream(model, site, ids[: about["reads"]]):
                    pass
            if turn:  # the first allocates
                seconds[what].append(process_time() - began)
    batch = shape[0] * (shape[1] - 1)
    handle = anatomy_of(model).blocks[0].register_forward_hook(count)
    found: dict[str, list[float]] = {}
    made = lambda: Shuffled(Stream(model, site, ids), size=2 * batch, batch=batch, seed=0)  # noqa: E731
    there, counts = list(islice(made(), STEPS)), {}
    for _ in range(rounds[1]):
        for what, many, source in (("one", 1, made()), ("two", 2, made()), ("alone", 1, there)):
            passes = 0
            read, fitted = fits(site, many, source, there[0][site], about["latents"], about["k"])
            counts[what] = passes
            found.setdefault(f"{what}, reading", []).append(read)
            found.setdefault(f"{what}, fitting", []).append(fitted)
    handle.remove()
    second = [two - one for two, one in zip(found["two, fitting"], found["one, fitting"], strict=True)]
    return {
        "model": name, "site": site, "tokens": shape[0] * shape[1], "latents": about["latents"], "k": about["k"],
        "rounds": rounds, "seconds": {k: statistics.median(v) for k, v in (seconds | found).items()},
        "reading": ratio(seconds["reading"], seconds["forward"]),
        "second": ratio(second, found["alone, fitting"]),
        "reading of two": ratio(found["two, reading"], found["one, reading"]), "passes": counts,
    }  # fmt: skip


def fits(site: str, many: int, source: Iterable[Rows], rows: Tensor, latents: int, k: int) -> tuple[float, float]:
    """CPU seconds of reading, and of all else, of fitting so many dictionaries."""
    entries = {
        str(i): Entry(site, Dictionary(rows.shape[1], latents, BatchTopK(k=float(k)), seed=i), Settings())
        for i in range(many)
    }
    timed, began = Timed(source), process_time()
    fit(entries, timed, steps=STEPS)
    return timed.seconds, process_time() - began - timed.seconds
