"""Fast forms of the geometric methods: one pass for the Gram matrix, one to apply the coefficients that follow from it.

SLERP, NuSLERP, Multi-SLERP, the Karcher mean and Model Stock never leave the span of their inputs, so a matrix of as
many rows as there are inputs holds all they need to know of a tensor. The equations are in `methods.geometric`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgery.weights.kernels import KERNELS, Chunks, combination
from surgery.weights.methods import geometric
from surgery.weights.methods.registry import per_input
from surgery.weights.streams import Streams

BLOCK = 1 << 17
"""Products are summed in float32 over this many numbers at most, and in float64 from there on."""


def gram(streams: Streams, *, of_deltas: bool) -> Tensor:
    """Inner products (inputs, inputs) in float64 of one tensor of all inputs: of their differences from the base, or
    of the inputs themselves, the base first if there is one."""
    count = streams.inputs + (streams.has_base and not of_deltas)
    total = torch.zeros(count, count, dtype=torch.float64)
    for start, stop in streams.chunks():
        vectors = streams.deltas(start, stop)[1] if of_deltas else streams.load(start, stop)
        for i, a in enumerate(vectors):
            for j, b in enumerate(vectors[: i + 1]):
                products = [torch.dot(x, y) for x, y in zip(a.split(BLOCK), b.split(BLOCK), strict=True)]
                total[i, j] += torch.stack(products).sum(dtype=torch.float64).cpu()
    return total + total.tril(-1).T


@KERNELS.register("slerp")
def slerp(streams: Streams, *, t: float) -> Chunks:
    """See `methods.geometric.slerp`. Reports which branch the tensor took."""
    products = gram(streams, of_deltas=False)
    at_base, at_tuned = geometric.slerp_coefficients(products, t).tolist()
    cosine = float(geometric.cosines(products)[0, 1])
    streams.report |= {"cosine": cosine, "branch": "linear" if abs(cosine) > geometric.COLLINEAR else "spherical"}
    return combination(streams, at_base, [at_tuned])


@KERNELS.register("nuslerp")
def nuslerp(streams: Streams, *, weight: Any = 1.0, flatten: bool = True, row_wise: bool = False) -> Chunks | None:
    """See `methods.geometric.nuslerp`."""
    if not flatten:
        return None
    first, second = per_input(weight, 2, "weight")
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    found = geometric.slerp_coefficients(gram(streams, of_deltas=streams.has_base), t, collinear=1 - 1e-12)
    return _around_base(streams, found)


@KERNELS.register("multislerp")
def multislerp(streams: Streams, *, weight: Any = 1.0, normalize: bool = True, eps: float = 1e-8) -> Chunks:
    """See `methods.geometric.multislerp`."""
    weights = per_input(weight, streams.inputs, "weight")
    if streams.inputs == 1:
        return _around_base(streams, torch.ones(1))
    products = gram(streams, of_deltas=streams.has_base)
    return _around_base(streams, geometric.multislerp_coefficients(products, weights, normalize, eps))


@KERNELS.register("karcher")
def karcher(streams: Streams, *, weight: Any = 1.0, max_iter: int = 10, tol: float = 1e-5) -> Chunks:
    """See `methods.geometric.karcher`."""
    weights = per_input(weight, streams.inputs, "weight")
    products = gram(streams, of_deltas=False)
    return combination(streams, 0.0, geometric.karcher_coefficients(products, weights, max_iter, tol).tolist())


@KERNELS.register("model_stock")
def model_stock(streams: Streams, *, filter_wise: bool = False) -> Chunks | None:
    """See `methods.geometric.model_stock`. Reports the ratio t."""
    if filter_wise:
        return None
    ratio = float(geometric.model_stock_ratio(gram(streams, of_deltas=True)))
    streams.report["ratio"] = ratio
    return _around_base(streams, torch.full((streams.inputs,), ratio / streams.inputs, dtype=torch.float64))


def _around_base(streams: Streams, coefficients: Tensor) -> Chunks:
    """The sum of differences on top of the base; without a base, of the inputs themselves."""
    numbers = coefficients.tolist()
    return combination(streams, 1.0 - sum(numbers) if streams.has_base else 0.0, numbers)
