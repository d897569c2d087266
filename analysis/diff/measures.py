"""Both models of a pair over the same texts, once: what sees each batch, and what is made of it in the end.

| measure      | of each token | value                                                                     |
|--------------|---------------|---------------------------------------------------------------------------|
| `kl`         | logits        | KL(tuned || base) of the next token's distribution, nats                  |
| `agreement`  | logits        | whether both find the same next token most likely                         |
| `norms`      | stream        | `norms`: ||x_tuned - x_base||; `relative norms`: that over ||x_base||     |
| `cosine`     | stream        | of x_tuned and x_base                                                     |
| `cka`        | a sample      | unbiased linear CKA of the two clouds of tokens, one value a layer        |
| `procrustes` | a sample      | what is left after the best rotation and stretching, one value a layer    |

To add one: a `Collector` (or one that is there), and a function of it under `@measure(name, collector)`. Memory: the
base's activations of one batch; of the tuned model one layer at a time; logits of a few tokens; what collectors keep.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from analysis.diff.per_token import PerToken, Texts
from analysis.prompts import Progress, by_length
from analysis.results import Result
from analysis.similarity import BLOCK, cka, cosine, kl, procrustes
from analysis.similarity import agreement as agrees
from surgery.activations import capture, edit, run
from surgery.activations.interventions import unwrapped
from surgery.anatomy import Site, anatomy_of
from surgery.errors import SurgeryError
from surgery.models import Batch, Pair, encode, untouched
from surgery.registry import Registry


@dataclass(frozen=True)
class Scope:
    """What is looked at: the texts, one site in some layers, and the tokens whose activations are kept."""

    texts: Texts
    layers: Sequence[int]
    sample: np.ndarray
    """(tokens,) ascending places."""


class Collector:
    """Sees every token of every batch once, and keeps what it needs of it."""

    reads: ClassVar[Literal["logits", "stream"]]

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    def see(self, places: np.ndarray, tuned: Tensor, base: Tensor, layer: int) -> None:
        """Both models' (tokens, d) at `places`: logits, or the site's values in `scope.layers[layer]`."""
        raise NotImplementedError

    def empty(self, *more: int) -> np.ndarray:
        """A place for a number of every token."""
        return np.full((self.scope.texts.total, *more), np.nan, dtype=np.float32)


class Divergences(Collector):
    """KL(tuned || base)."""

    reads = "logits"

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        self.values = self.empty()

    def see(self, places: np.ndarray, tuned: Tensor, base: Tensor, layer: int) -> None:
        self.values[places] = _numbers(kl(tuned, base))


class Agreements(Collector):
    """Whether the likeliest tokens are the same."""

    reads = "logits"

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        self.values = self.empty()

    def see(self, places: np.ndarray, tuned: Tensor, base: Tensor, layer: int) -> None:
        self.values[places] = _numbers(agrees(tuned, base))


class Distances(Collector):
    """L2 norm of the difference, and of the base."""

    reads = "stream"

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        self.difference, self.base = self.empty(len(scope.layers)), self.empty(len(scope.layers))

    def see(self, places: np.ndarray, tuned: Tensor, base: Tensor, layer: int) -> None:
        self.difference[places, layer] = _numbers((tuned - base).norm(dim=-1))
        self.base[places, layer] = _numbers(base.norm(dim=-1))


class Cosines(Collector):
    """Cosine of both models' values."""

    reads = "stream"

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        self.values = self.empty(len(scope.layers))

    def see(self, places: np.ndarray, tuned: Tensor, base: Tensor, layer: int) -> None:
        self.values[places, layer] = _numbers(cosine(tuned, base))


class Clouds(Collector):
    """The activations themselves, of the sampled tokens: (layer, token, d) of both models, float32."""

    reads = "stream"
    tuned: Tensor
    base: Tensor

    def see(self, places: np.ndarray, tuned: Tensor, base: Tensor, layer: int) -> None:
        if not hasattr(self, "base"):
            shape = (len(self.scope.layers), len(self.scope.sample), base.shape[-1])
            self.tuned, self.base = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        _, here, there = np.intersect1d(places, self.scope.sample, assume_unique=True, return_indices=True)
        rows = torch.from_numpy(here)
        self.tuned[layer, there], self.base[layer, there] = tuned[rows].cpu(), base[rows].cpu()


# ---- what is made of it

Found = dict[str, PerToken | Result]


@dataclass(frozen=True)
class Measure:
    """What collects, and what is made of it: named values."""

    collector: type[Collector]
    found: Callable[[Any], Found]


MEASURES: Registry[Measure] = Registry("measure")


def measure(name: str, collector: type[Collector]) -> Callable[[Callable[[Any], Found]], Callable[[Any], Found]]:
    """Decorator that files a measure by its name."""

    def add(function: Callable[[Any], Found]) -> Callable[[Any], Found]:
        MEASURES.register(name)(Measure(collector, function))
        return function

    return add


@measure("kl", Divergences)
def _kl(seen: Divergences) -> Found:
    return {"kl": PerToken("KL(tuned || base), nats", seen.values, seen.scope.texts)}


@measure("agreement", Agreements)
def _agreement(seen: Agreements) -> Found:
    return {"agreement": PerToken("top-1 agreement", seen.values, seen.scope.texts)}


@measure("norms", Distances)
def _norms(seen: Distances) -> Found:
    relative = seen.difference / np.maximum(seen.base, np.finfo(np.float32).tiny)
    texts, layers = seen.scope.texts, seen.scope.layers
    return {"norms": PerToken("||difference||", seen.difference, texts, layers),
            "relative norms": PerToken("||difference|| / ||base||", relative, texts, layers)}  # fmt: skip


@measure("cosine", Cosines)
def _cosine(seen: Cosines) -> Found:
    return {"cosine": PerToken("cosine", seen.values, seen.scope.texts, seen.scope.layers)}


@measure("cka", Clouds)
def _cka(seen: Clouds) -> Found:
    return {"cka": _of_cloud(seen, "CKA", cka(seen.tuned, seen.base, unbiased=True))}


@measure("procrustes", Clouds)
def _procrustes(seen: Clouds) -> Found:
    return {"procrustes": _of_cloud(seen, "Procrustes residual", procrustes(seen.tuned, seen.base))}


def _of_cloud(seen: Clouds, name: str, values: Tensor) -> Result:
    """(1, layer): the whole cloud is one example, which has no interval."""
    meta = {"tokens": len(seen.scope.sample)}
    return Result(values.numpy()[None], {"example": ["all texts"], "layer": list(seen.scope.layers)}, name, meta=meta)


# ---- the pass


def measured(
    pair: Pair,
    texts: Texts,
    names: Sequence[str],
    *,
    site: str = "resid_post",
    sample: int = 2048,
    seed: int = 0,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Found:
    """What the named measures find on the texts; two that need the same are given it once.

    Raises `SurgeryError` for a name that is none, and for a site that is no place of the stream.
    """
    wanted = {name: MEASURES.lookup(name) for name in names}
    if not wanted:
        raise SurgeryError("No measure is named.", hint=f"Choose from {', '.join(MEASURES)}.")
    scope = Scope(texts, stream_layers(pair, site), sampled(texts, sample, seed))
    collectors = {kind: kind(scope) for kind in dict.fromkeys(one.collector for one in wanted.values())}
    stream(pair, texts, list(collectors.values()), site=site, layers=scope.layers, batch_size=batch_size,
           progress=progress)  # fmt: skip
    found: Found = {}
    for one in wanted.values():
        found |= one.found(collectors[one.collector])
    return found


def stream_layers(pair: Pair, site: str) -> list[int]:
    """The layers of a site's name: all, or the one that it names."""
    found = anatomy_of(unwrapped(pair.base)).expand([site])
    if wrong := [s for s in found if s.kind != "stream" or s.position is not None]:
        raise SurgeryError(f"Activations are compared by token at a site of the stream, and '{wrong[0]}' is none.",
                           hint="For instance resid_post, attn_out or mlp_out.")  # fmt: skip
    return [0 if s.layer is None else s.layer for s in found]


def sampled(texts: Texts, size: int, seed: int) -> np.ndarray:
    """Ascending places of at most `size` tokens, each drawn with equal chance."""
    places = np.random.default_rng(seed).choice(texts.total, min(size, texts.total), replace=False)
    return np.sort(places)


def stream(
    pair: Pair,
    texts: Texts,
    collectors: Sequence[Collector],
    *,
    site: str = "resid_post",
    layers: Sequence[int] = (),
    batch_size: int = 8,
    progress: Progress | None = None,
) -> None:
    """Shows every token to every collector, batch by batch of similar length; each model reads each text once.

    Where no collector reads logits, both models stop behind the deepest layer. Of vocabularies of different size the
    tokens that both have are compared.
    """
    base, tuned = unwrapped(pair.base), unwrapped(pair.tuned)
    logits = [c for c in collectors if c.reads == "logits"]
    values = [c for c in collectors if c.reads == "stream"]
    name = Site.parse(site).name
    sites = [Site(name, layer) if name not in ("embed", "final") else Site(name) for layer in layers] if values else []
    for rows in by_length(texts.rows, batch_size, progress):
        batch, places = encode(None, [texts.rows[i] for i in rows]), texts.places(rows)
        with untouched(base, tuned):
            before = _passed(base, batch, sites, final=bool(logits))

            looks = {site: _look(values, layer, places, batch, before, site) for layer, site in enumerate(sites)}
            after = _passed(tuned, batch, sites[-1:], looks, final=bool(logits))
            if logits:
                _show_logits(pair, places, _real(after["final"], batch), _real(before["final"], batch), logits)


def _look(
    collectors: Sequence[Collector], layer: int, places: np.ndarray, batch: Batch, before: Mapping[Any, Tensor],
    site: Site,
) -> Callable[[Tensor], None]:  # fmt: skip
    """An edit that changes nothing: it shows the tuned model's value, while it is there, beside the base's."""

    def look(value: Tensor) -> None:
        here = _real(value, batch).float()
        there = _real(before[site], batch).to(here.device).float()
        for collector in collectors:
            collector.see(places, here, there, layer)

    return look


def _passed(
    model: Any, batch: Batch, sites: Sequence[Site], looks: Mapping[Any, Any] | None = None, *, final: bool
) -> Mapping[Any, Tensor]:
    """The values of sites in one pass, and of the last norm with `final`; no more logits than a model must give."""
    if not final:
        return run(model, batch, sites, edits=looks, stop=True)[1]
    more: dict[str, Any] = (
        {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    )
    with edit(model, looks or {}), capture(model, ["final", *([] if looks else sites)]) as seen:
        model(**batch.inputs(model), use_cache=False, **more)
    return seen


def _show_logits(pair: Pair, places: np.ndarray, tuned: Tensor, base: Tensor, collectors: Sequence[Collector]) -> None:
    """The last norm's outputs as logits, a block of tokens at a time."""
    heads = anatomy_of(unwrapped(pair.tuned)), anatomy_of(unwrapped(pair.base))
    step = max(1, BLOCK // heads[0].head.weight.shape[0])
    for start in range(0, len(places), step):
        part = slice(start, start + step)
        after, before = heads[0].logits(tuned[part]).float(), heads[1].logits(base[part]).float()
        shared = min(after.shape[-1], before.shape[-1])
        for collector in collectors:
            collector.see(places[part], after[:, :shared], before[:, :shared].to(after.device), 0)


def _real(value: Tensor, batch: Batch) -> Tensor:
    """(tokens, d) of (batch, pos, d): the real tokens of one row after the other."""
    return value[batch.mask.to(value.device)]


def _numbers(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
