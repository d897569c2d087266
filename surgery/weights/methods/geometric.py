"""Methods that interpolate directions. All of them stay in the span of their inputs.

That makes each one two plain steps: the Gram matrix of the inputs, G_ij = <x_i, x_j> in float64, gives a coefficient
for each input (`*_coefficients`, pure functions of small matrices), and the result is sum c_i x_i. A leading batch
dimension of the Gram matrix treats rows (or columns) by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.weights.methods.linear import weight_sum
from surgery.weights.methods.registry import PerInput, method, per_input

COLLINEAR = 0.9995
"""SLERP of vectors whose cosine is larger than this in magnitude is linear interpolation."""


def gram(vectors: Sequence[Tensor]) -> Tensor:
    """Inner products over the last dimension, in float64: inputs of shape (..., n) give (..., inputs, inputs)."""
    pairs = [[(a.double() * b.double()).sum(dim=-1) for b in vectors[: i + 1]] for i, a in enumerate(vectors)]
    size = range(len(vectors))
    return torch.stack([torch.stack([pairs[max(i, j)][min(i, j)] for j in size], -1) for i in size], -2)


def cosines(g: Tensor) -> Tensor:
    """Cosine similarities from a Gram matrix; a zero vector is orthogonal to all, itself included."""
    norms = g.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = torch.where(norms > 0, norms, torch.inf)
    return (g / (scale.unsqueeze(-1) * scale.unsqueeze(-2))).clamp(-1, 1)


def combine(vectors: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """sum c_i x_i over the inputs; coefficients (..., inputs), vectors (..., n)."""
    total = torch.zeros_like(vectors[0])
    for x, c in zip(vectors, coefficients.to(vectors[0].dtype).unbind(-1), strict=True):
        total = total + c.unsqueeze(-1) * x
    return total


def slerp_coefficients(g: Tensor, t: float, collinear: float = COLLINEAR) -> Tensor:
    """Coefficients (..., 2) of spherical interpolation from x_0 (t = 0) to x_1 (t = 1), given their Gram matrix.

    sin((1-t) theta) / sin theta and sin(t theta) / sin theta, where cos theta is not beyond +-`collinear`; there, and
    for opposite vectors, 1 - t and t. A zero vector counts as orthogonal. Shoemake 1985.
    """
    c = cosines(g)[..., 0, 1]
    linear = c.abs() > collinear
    theta = torch.where(linear, math.pi / 2, c.acos())
    sphere = torch.stack([((1 - t) * theta).sin(), (t * theta).sin()], -1) / theta.sin().unsqueeze(-1)
    return torch.where(linear.unsqueeze(-1), torch.tensor([1 - t, t], dtype=g.dtype), sphere)


@method("slerp", needs_base=True, unit="tensor", inputs=(1, 1))
def slerp(tuned: Sequence[Tensor], base: Tensor, *, t: float) -> Tensor:
    """Spherical interpolation from the base (t = 0) to the tuned model (t = 1), each tensor one vector.

    When |cos| > 0.9995, as for every update smaller than 3.2 % of the base, it is linear interpolation.
    Shoemake 1985; threshold as in mergekit.
    """
    pair = [base.reshape(-1), tuned[0].reshape(-1)]
    coefficients = slerp_coefficients(gram(pair), t)
    if float(coefficients.sum()) == 1.0:  # linear: as base + t * difference, which leaves equal elements as they are
        return base + t * (tuned[0] - base)
    return combine(pair, coefficients).reshape(base.shape)


@method(
    "nuslerp",
    needs_base="optional",
    unit="tensor",
    unit_if={("row_wise", True): "tensor", ("flatten", False): "row"},
    inputs=(2, 2),
)
def nuslerp(
    tuned: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    weight: PerInput[float] = 1.0,
    flatten: bool = True,
    row_wise: bool = False,
) -> Tensor:
    """Spherical interpolation of two models, or with a base of their task vectors, at t = w_2 / (w_1 + w_2).

    Never linear but for (anti)parallel vectors. With flatten=False every vector along the last dimension, or with
    `row_wise` along the first, by itself (the names are mergekit's). Weights that sum to 0 give t = 1/2.
    NuSLERP, of mergekit.
    """
    first, second = per_input(weight, 2, "weight")
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    vectors = list(tuned) if base is None else [f - base for f in tuned]
    shape = vectors[0].shape
    turn = row_wise and not flatten and len(shape) > 1
    if flatten or not shape:
        vectors = [v.reshape(-1) for v in vectors]
    elif turn:
        vectors = [v.transpose(0, -1) for v in vectors]
    merged = combine(vectors, slerp_coefficients(gram(vectors), t, collinear=1 - 1e-12))
    merged = (merged.transpose(0, -1) if turn else merged).reshape(shape)
    return merged if base is None else base + merged


def multislerp_coefficients(g: Tensor, weight: Sequence[float], normalize: bool, epsilon: float) -> Tensor:
    """Coefficients (inputs,) of the weighted mean direction, as long as the weighted mean norm. See `multislerp`."""
    w = torch.tensor(weight, dtype=g.dtype)
    if normalize:
        w = w / weight_sum(weight)
    norms = g.diagonal().sqrt()
    direction = torch.where(norms > 0, w / norms, 0.0)
    length = (direction @ g @ direction).clamp_min(0).sqrt()
    return w if length < epsilon else direction * ((w @ norms) / length)


@method("multislerp", needs_base="optional", unit="tensor")
def multislerp(
    tuned: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    weight: PerInput[float] = 1.0,
    normalize: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """Weighted mean direction of any number of models (or, with a base, task vectors), at their weighted mean norm.

    Multi-SLERP goes from the mean direction along the weighted mean of the tangents there; that mean is always 0,
    since the directions' weighted sum has no component across itself, so the mean direction is the whole result.
    Directions that cancel (mean shorter than `eps`) give the weighted sum. One input is returned as it is.
    Goddard, goddard.blog/posts/multislerp-wow-what-a-cool-idea; mergekit.
    """
    if len(tuned) == 1:
        return tuned[0].clone()
    weights = per_input(weight, len(tuned), "weight")
    origin = 0.0 if base is None else base
    vectors = [(f - origin).reshape(-1) for f in tuned]
    merged = combine(vectors, multislerp_coefficients(gram(vectors), weights, normalize, eps))
    return merged.reshape(tuned[0].shape) + origin


def karcher_coefficients(g: Tensor, weight: Sequence[float], max_iter: int, tol: float) -> Tensor:
    """Coefficients (inputs,) of the Karcher mean of the directions, as long as the weighted mean norm.

    Works on coefficients of unit vectors, whose Gram matrix are the cosines: the mean c moves along the weighted sum
    of the logarithms theta_i / sin theta_i * (u_i - cos theta_i * c) until that is shorter than `tol`.
    """
    norms = g.diagonal().sqrt()
    share = torch.tensor(weight, dtype=g.dtype) / weight_sum(weight)
    length = share @ norms
    active = torch.where(norms > tol, share, 0.0)
    if not active.any():
        return torch.zeros_like(share)
    active = active / active.sum()
    cos = cosines(g)

    def norm(c: Tensor) -> Tensor:
        return (c @ cos @ c).clamp_min(0).sqrt()

    mean = active.clone()
    if norm(mean) < tol:  # directions that cancel: start at the first
        mean = torch.eye(len(mean), dtype=g.dtype)[int(active.nonzero()[0])]
    mean = mean / norm(mean)
    for _ in range(max_iter):
        dot = (cos @ mean).clamp(-1, 1)
        theta = dot.acos()
        pull = torch.where(theta < tol, 0.0, active * theta / theta.sin())
        tangent = pull - (pull @ dot) * mean
        step = norm(tangent)
        if step < tol:
            break
        mean = step.cos() * mean + step.sin() / step * tangent
        mean = mean / norm(mean)
    return torch.where(norms > 0, length * mean / norms, 0.0)


@method("karcher", needs_base=False, unit="tensor", paper="arXiv:2603.04972")
def karcher(
    tuned: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    weight: PerInput[float] = 1.0,
    max_iter: int = 10,
    tol: float = 1e-5,
) -> Tensor:
    """Riemannian (Karcher) mean of the models' directions on the sphere, at their mean norm.

    Models whose norm is below `tol` have no direction. mergekit has equal weights only. arXiv:2603.04972.
    """
    weights = per_input(weight, len(tuned), "weight")
    vectors = [f.reshape(-1) for f in tuned]
    return combine(vectors, karcher_coefficients(gram(vectors), weights, max_iter, tol)).reshape(tuned[0].shape)


def model_stock_ratio(g: Tensor) -> Tensor:
    """How far to go from the base to the average, t = N c / (1 + (N - 1) c), from the Gram matrix of N differences.

    c is the mean cosine of all pairs; a difference of 0 is orthogonal to all. Where 1 + (N - 1) c vanishes, t = 0.
    """
    n = g.shape[-1]
    above = torch.triu(torch.ones(n, n, dtype=torch.bool), diagonal=1)
    c = cosines(g)[..., above].mean(dim=-1)
    below = 1 + (n - 1) * c
    singular = below.abs() < 1e-6
    return torch.where(singular, 0.0, n * c / torch.where(singular, 1.0, below))


@method("model_stock", needs_base=True, unit="tensor", unit_if={("filter_wise", True): "row"}, inputs=(2, None),
        paper="arXiv:2403.19522")  # fmt: skip
def model_stock(tuned: Sequence[Tensor], base: Tensor, *, filter_wise: bool = False) -> Tensor:
    """From the base towards the average, the further the more the task vectors agree: B + t * (mean(F) - B).

    t = N c / (1 + (N - 1) c) with c the mean cosine of the task vectors of a tensor, or of each row.
    Jang et al. 2024, arXiv:2403.19522, equation 7; for more than two models c is the mean over pairs, as in mergekit.
    """
    deltas = [f - base for f in tuned]
    vectors = deltas if filter_wise and base.ndim else [d.reshape(-1) for d in deltas]
    t = model_stock_ratio(gram(vectors)).to(base.dtype)
    mean = combine(vectors, torch.full((len(vectors),), 1 / len(vectors), dtype=torch.float64))
    return base + (t.unsqueeze(-1) * mean).reshape(base.shape)
