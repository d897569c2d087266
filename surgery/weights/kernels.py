"""The fast forms of the merge methods: generators of merged chunks, in float32, without a whole tensor in memory.

`methods/` holds the equations as one reads them; here the same numbers come out at the speed of memory. Three shapes
are enough for almost all of them:

* **sums of sparsified differences** (`sparse_sum`): task arithmetic, TIES, DARE, Breadcrumbs; thresholds come from the
  radix selection of `selection.py`, random masks from counter-based bits;
* **linear combinations** (`combinations.py`): SLERP, Karcher means, Model Stock and their kin stay in the span of their
  inputs, so one pass for the Gram matrix gives coefficients and a second one applies them;
* **by rows** (`from_reference`): what works element by element or row by row is the reference itself, called on chunks.

A kernel is a generator of (first row, merged rows as flat float32 scratch), registered under its method's name. It
returns None when its parameters ask for what only the reference does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgery.registry import Registry
from surgery.weights.methods.linear import Normalize, divisor, weight_sum
from surgery.weights.methods.registry import Method, per_input
from surgery.weights.selection import Cut, cuts
from surgery.weights.sparsify import SMALLEST_16_BIT_DENSITY, band_counts, kept, random_bits
from surgery.weights.streams import Streams, Workspace

Chunks = Iterator[tuple[int, Tensor]]
Kernel = Callable[..., Chunks | None]
Sparsifier = Callable[[Tensor, Tensor, int], Tensor]
"""(differences, scratch for the result, index of the first element in the tensor) -> what is kept, zeros elsewhere."""

KERNELS: Registry[Kernel] = Registry("kernel")


def merged(method: Method, streams: Streams, parameters: dict[str, Any], *, double: bool = False) -> Chunks:
    """The merged chunks of one tensor: by the method's kernel where there is one, else by the reference.

    `double`: in float64, as the reference does when an input is float64.
    """
    import surgery.weights.combinations  # noqa: F401 - registers its kernels, and needs this module's names

    kernel = None if double else KERNELS.get(method.name)
    chunks = kernel(streams, **parameters) if kernel is not None else None
    if chunks is None:
        chunks = from_reference(method, streams, parameters, torch.float64 if double else torch.float32)
    return chunks


def from_reference(method: Method, streams: Streams, parameters: dict[str, Any], dtype: torch.dtype) -> Chunks:
    """The reference itself: chunk by chunk where it works on rows or elements, else on the whole tensor."""
    unit = method.unit_for(parameters)
    if dtype == torch.float64 or unit == "tensor" or (unit == "row" and len(streams.shape) < 2):
        tuned, base = streams.whole(dtype)
        yield 0, method.function(tuned, base, **parameters).reshape(-1)
        return
    for start, stop in streams.chunks():
        shape = (stop - start, *streams.shape[1:]) if streams.shape else ()
        loaded = [numbers.view(shape) for numbers in streams.load(start, stop)]
        base = loaded.pop(0) if streams.has_base else None
        place = {"offset": start * streams.cols} if "offset" in method.hidden else {}
        yield start, method.function(loaded, base, **parameters, **place).reshape(-1)


# --- sums of sparsified differences ---------------------------------------------------------------------------------


def sparse_sum(
    streams: Streams,
    keep: Sequence[Sparsifier | None],
    *,
    weight: Sequence[float],
    scale: float,
    election: str | None,
    normalize: Normalize,
) -> Chunks:
    """`base + scale * sum_i w_i keep_i(d_i)`, with a vote on each element's sign when there is an `election`."""
    scratch = streams.work.take
    for start, stop in streams.chunks():
        base, deltas = streams.deltas(start, stop)
        size = base.numel()
        kept = [
            d if sparsify is None else sparsify(d, scratch(("kept", i), size), start * streams.cols)
            for i, (d, sparsify) in enumerate(zip(deltas, keep, strict=True))
        ]
        if election is None:
            total = kept[0].mul_(weight[0])
            for d, w in zip(kept[1:], weight[1:], strict=True):
                total.add_(d, alpha=w)
            factor = scale / divisor(weight, normalize)
        else:
            total = _elect(kept, weight, election, normalize, partial(scratch, numel=size))
            factor = scale
        yield start, base.add_(total, alpha=factor)


def _elect(
    kept: Sequence[Tensor],
    weight: Sequence[float],
    election: str,
    normalize: Normalize,
    scratch: Callable[[str], Tensor],
) -> Tensor:
    """The (mean of the) weighted differences that agree with the elected sign, made in `kept[0]`; a tie elects +."""
    sign, agree, divisor = scratch("sign").zero_(), scratch("agree"), scratch("divisor").zero_()
    for d, w in zip(kept, weight, strict=True):
        if election == "unweighted":
            sign.add_(d)
        if w != 1.0:
            d.mul_(w)
        if election != "unweighted":
            sign.add_(torch.sign(d, out=agree) if election == "frequency" else d)
    sign.sign_().add_(0.5).sign_()
    shares = weight if normalize == "weights" else [1.0] * len(kept)
    for d, share in zip(kept, shares, strict=True):
        d.mul_(sign).clamp_min_(0)  # what disagrees is 0 now, and agrees with nothing
        if normalize != "none":
            divisor.add_(torch.sign(d, out=agree), alpha=share)
    total = kept[0]
    for d in kept[1:]:
        total.add_(d)
    if normalize != "none":
        # Where nobody agrees the sum is 0: any divisor but 0 will do.
        total.div_(
            divisor.clamp_min_(min(shares)) if min(shares) > 0 else divisor.masked_fill_(divisor.abs() < 1e-8, 1)
        )
    return total.mul_(sign)


class Band:
    """Keeps the differences between two nested cuts: down to `lower`, without the outliers above `upper`."""

    def __init__(self, lower: Cut, upper: Cut | None, work: Workspace) -> None:
        self.lower, self.upper, self.work = replace(lower), replace(upper) if upper else None, work

    def __call__(self, d: Tensor, out: Tensor, start: int) -> Tensor:
        self.lower.keep(d, out, self.work)
        if self.upper is not None and self.upper.threshold != math.inf:
            out.sub_(self.upper.keep(d, self.work.take("outliers", d.numel()), self.work))
        return out


class Dropout:
    """Keeps each difference with probability `density`, by random bits that depend on its place alone."""

    def __init__(self, density: float, key: int, work: Workspace) -> None:
        self.width = 16 if density >= SMALLEST_16_BIT_DENSITY else 32
        self.limit, self.key, self.work = math.ceil(density * 2.0**self.width), key, work

    def __call__(self, d: Tensor, out: Tensor, start: int) -> Tensor:
        if self.limit == 0:
            return out.zero_()
        bits = random_bits(d.numel(), self.key, start, self.width)  # type: ignore[arg-type]
        mask = torch.from_numpy((bits <= bits.dtype.type(self.limit - 1)).view(np.uint8))
        return out.copy_(mask).mul_(d)  # arithmetic on numbers beats selection by booleans several times


class Rescaled:
    """A sparsifier whose result is multiplied by `factor`."""

    def __init__(self, keep: Sparsifier, factor: float) -> None:
        self.keep, self.factor = keep, factor

    def __call__(self, d: Tensor, out: Tensor, start: int) -> Tensor:
        return self.keep(d, out, start).mul_(self.factor)


def bands(streams: Streams, ranks: Sequence[tuple[int, int]], ties: str) -> list[Callable[[], Sparsifier] | None]:
    """Per input what makes a `Band` that keeps ranks `removed` to `removed + wanted` of the magnitudes, largest first.

    None where everything is kept. The number of elements tied at each threshold goes into the streams' report.
    """
    if all(removed == 0 and wanted >= streams.numel for wanted, removed in ranks):
        return [None] * len(ranks)

    def walk() -> Iterator[list[Tensor]]:
        return (streams.deltas(start, stop)[1] for start, stop in streams.chunks())

    sought = [(wanted + removed, removed) for wanted, removed in ranks]
    found = cuts(walk, sought, streams.work, ties=ties, sample=streams.sample(), numel=streams.numel)
    streams.report["ties_at_threshold"] = [lower.equal if lower.threshold > 0 else 0 for lower, _ in found]
    streams.report["kept_share"] = [wanted / streams.numel for wanted, _ in ranks]
    return [partial(Band, lower, upper, streams.work) for lower, upper in found]


def rescaled(streams: Streams, makers: Sequence[Callable[[], Sparsifier] | None]) -> list[Sparsifier | None]:
    """Sparsifiers that restore the L1 norm of every input's differences; costs one more pass over them."""
    keep = [None if make is None else make() for make in makers]
    before, after = np.zeros(len(keep)), np.zeros(len(keep))
    for start, stop in streams.chunks():
        _, deltas = streams.deltas(start, stop)
        for i, (d, sparsify) in enumerate(zip(deltas, keep, strict=True)):
            if sparsify is not None:
                out = sparsify(d, streams.work.take(("kept", i), d.numel()), start * streams.cols)
                before[i] += float(d.abs_().sum())  # several times faster than vector_norm(d, 1)
                after[i] += float(out.abs_().sum())
    factors = [float(b / a) if a > 0 else 1.0 for b, a in zip(before, after, strict=True)]
    return [None if make is None else Rescaled(make(), f) for make, f in zip(makers, factors, strict=True)]


def _sum(streams: Streams, makers: Sequence[Any], rescale: str, **how: Any) -> Chunks:
    """`sparse_sum` with the sparsifiers made and, for "l1", rescaled."""
    keep = rescaled(streams, makers) if rescale == "l1" else [make and make() for make in makers]
    return sparse_sum(streams, keep, **how)


# --- the methods ----------------------------------------------------------------------------------------------------


def _inputs(streams: Streams, **values: Any) -> list[list[Any]]:
    """Per-input parameters as lists."""
    return [per_input(value, streams.inputs, name) for name, value in values.items()]


def _only_reference(weight: Sequence[float], election: str | None, ties: str = "index") -> bool:
    """What the kernels leave to the reference: seeded choice among ties, votes that weights of 0 or less turn round."""
    return ties == "random" or (election == "unweighted" and min(weight) <= 0)


@KERNELS.register("linear")
def linear(streams: Streams, *, weight: Any = 1.0, normalize: bool = True) -> Chunks:
    """See `methods.linear.linear`."""
    (weights,) = _inputs(streams, weight=weight)
    total = weight_sum(weights) if normalize else 1.0
    return combination(streams, 0.0, [w / total for w in weights])


@KERNELS.register("task_arithmetic")
def task_arithmetic(
    streams: Streams, *, weight: Any = 1.0, scale: float = 1.0, normalize: Normalize = "none"
) -> Chunks:
    """See `methods.linear.task_arithmetic`."""
    (weights,) = _inputs(streams, weight=weight)
    return sparse_sum(streams, [None] * len(weights), weight=weights, scale=scale, election=None, normalize=normalize)


@KERNELS.register("ties")
def ties(
    streams: Streams,
    *,
    weight: Any = 1.0,
    density: Any = 0.2,
    scale: float = 1.0,
    normalize: Normalize = "weights",
    election: str = "total",
    rescale: str = "none",
    scope: str = "tensor",
    ties: str = "index",
    selections: Sequence[Cut] | None = None,
    keys: Any = None,
) -> Chunks | None:
    """See `methods.sparse.ties`; with `scope="model"` the engine passes the cuts of the whole model."""
    weights, densities = _inputs(streams, weight=weight, density=density)
    if _only_reference(weights, election, ties):
        return None
    if selections is not None:
        makers: list[Any] = [partial(Band, c, None, streams.work) for c in selections]
    else:
        makers = list(bands(streams, [(kept(p, streams.numel), 0) for p in densities], ties))
    return _sum(streams, makers, rescale, weight=weights, scale=scale, election=election, normalize=normalize)


def breadcrumbs(
    streams: Streams,
    *,
    weight: Any = 0.2,
    density: Any = 0.15,
    top: Any = 0.006,
    bottom: Any = None,
    scale: float = 1.0,
    normalize: Normalize = "none",
    election: str | None = None,
    rescale: str = "none",
    scope: str = "tensor",
    ties: str = "index",
    keys: Any = None,
) -> Chunks | None:
    """See `methods.sparse.breadcrumbs`."""
    weights, *shares = _inputs(streams, weight=weight, density=density, top=top, bottom=bottom)
    if scope == "row" or _only_reference(weights, election, ties):
        return None
    makers = bands(streams, [band_counts(streams.numel, *share) for share in zip(*shares, strict=True)], ties)
    return _sum(streams, makers, rescale, weight=weights, scale=scale, election=election, normalize=normalize)


KERNELS.register("breadcrumbs")(breadcrumbs)


@KERNELS.register("breadcrumbs_ties")
def breadcrumbs_ties(
    streams: Streams, *, weight: Any = 1.0, normalize: Normalize = "weights", election: str = "total", **shared: Any
) -> Chunks | None:
    """See `methods.sparse.breadcrumbs_ties`."""
    return breadcrumbs(streams, weight=weight, normalize=normalize, election=election, **shared)


def dare(
    streams: Streams,
    *,
    weight: Any = 1.0,
    density: Any = 0.1,
    scale: float = 1.0,
    normalize: Normalize = "none",
    election: str | None = None,
    rescale: str = "expectation",
    keys: Any,
) -> Chunks | None:
    """See `methods.sparse.dare_linear`."""
    weights, densities, streams_of_bits = _inputs(streams, weight=weight, density=density, keys=keys)
    if _only_reference(weights, election):
        return None
    makers: list[Any] = []
    for p, key in zip(densities, streams_of_bits, strict=True):
        if p >= 1:
            makers.append(None)
        elif rescale == "expectation":
            makers.append(lambda p=p, key=key: Rescaled(Dropout(p, key, streams.work), 1 / p if p else 1.0))
        else:
            makers.append(lambda p=p, key=key: Dropout(p, key, streams.work))
    return _sum(streams, makers, rescale, weight=weights, scale=scale, election=election, normalize=normalize)


KERNELS.register("dare_linear")(dare)


@KERNELS.register("dare_ties")
def dare_ties(
    streams: Streams, *, normalize: Normalize = "weights", election: str = "total", **shared: Any
) -> Chunks | None:
    """See `methods.sparse.dare_ties`."""
    return dare(streams, normalize=normalize, election=election, **shared)


def combination(streams: Streams, base: float, coefficients: Sequence[float]) -> Chunks:
    """`base * B + sum_i c_i F_i`, written as `(base + sum c) * B + sum_i c_i (F_i - B)` where there is a base.

    So weights that should not move do not, which rounding of the plain sum would not grant.
    """
    for start, stop in streams.chunks():
        if streams.has_base:
            total, inputs = streams.deltas(start, stop)
            at_base = base + math.fsum(coefficients)
            if abs(at_base - 1.0) > 1e-12:
                total.mul_(at_base)
            rest = list(coefficients)
        else:
            total, *inputs = streams.load(start, stop)
            total.mul_(coefficients[0])
            rest = list(coefficients[1:])
        for numbers, c in zip(inputs, rest, strict=True):
            total.add_(numbers, alpha=c)
        yield start, total
