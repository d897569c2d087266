"""How alike two sets of activations, attention patterns or predictions are: pure functions on tensors.

| function | of | range | alike |
|---|---|---|---|
| `cka` | two clouds of points, up to rotation and scale | 0 to 1 (unbiased: mean 0 for independent clouds) | 1 |
| `procrustes`, `rotation` | two clouds of points, up to rotation | 0 to 1 | 0 |
| `cosine` | pairs of rows | -1 to 1 | 1 |
| `principal` | the directions in which differences lie | | |
| `attention_js` | rows of two attention patterns | 0 to log 2 (nats) | 0 |
| `kl`, `js` | next-token distributions | 0 to infinity, 0 to log 2 (nats) | 0 |
| `agreement` | most likely next tokens | 0 or 1 | 1 |
| `auc` | two samples of one number | 0 to 1 | 1/2 |

A cloud has shape (..., examples, d); all axes before (layers) are a batch. Arithmetic is float64 whatever comes in, one
layer or block of rows at a time, and in the smaller of examples and width. Nothing here needs a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analysis.results import Z95
from surgery.errors import SurgeryError

BLOCK = 2**22
"""Numbers of a block of logits or patterns that are in float64 at a time (32 MB, a few times over)."""


# ---- clouds of points


@torch.no_grad()
def cka(
    x: Float[Tensor, "*layer example d1"], y: Float[Tensor, "*layer example d2"], *, unbiased: bool = False
) -> Float[Tensor, "*layer"]:
    """Linear centred kernel alignment HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y)); the widths may differ.

    Kornblith et al. 2019 (arXiv:1905.00414): ||x'y||² / (||x'x|| ||y'y||) of centred x, y, which goes to 1 for any two
    clouds as their width grows beyond the number of examples. `unbiased` takes the estimator HSIC_1 of Song et al. 2012
    (as Nguyen et al. 2021, arXiv:2010.15327), whose mean is 0 for independent clouds; it may be slightly negative.
    NaN where a cloud is a single point (unbiased: where its own HSIC_1 is not positive).
    Raises `SurgeryError` when the examples differ in number or are fewer than 2 (unbiased: 4).
    """
    hsic = _hsic_unbiased if unbiased else _hsic

    def of(a: Tensor, b: Tensor) -> Tensor:
        own_a, own_b = hsic(a, a), hsic(b, b)
        return hsic(a, b) / (own_a * own_b).sqrt() if own_a > 0 and own_b > 0 else own_a.new_tensor(torch.nan)

    return _by_layer(of, x, y, least=4 if unbiased else 2, what="CKA")


def _hsic(x: Tensor, y: Tensor) -> Tensor:
    """||x'y||², which is <xx', yy'>."""
    if len(x) < max(x.shape[1], y.shape[1]):
        return ((x @ x.T) * (y @ y.T)).sum()
    return (x.T @ y).square().sum()


def _hsic_unbiased(x: Tensor, y: Tensor) -> Tensor:
    """HSIC_1 (Song et al. 2012) of K = xx' and L = yy' without their diagonals, which are not formed when n > d."""
    n = len(x)
    k, l = x.square().sum(1), y.square().sum(1)  # the diagonals
    rows_k, rows_l = x @ x.sum(0) - k, y @ y.sum(0) - l
    trace = _hsic(x, y) - k @ l
    rest = rows_k.sum() * rows_l.sum() / ((n - 1) * (n - 2)) - 2 * (rows_k @ rows_l) / (n - 2)
    return (trace + rest) / (n * (n - 3))


@torch.no_grad()
def procrustes(
    x: Float[Tensor, "*layer example d1"],
    y: Float[Tensor, "*layer example d2"],
    *,
    centre: bool = True,
    scaling: bool = True,
) -> Float[Tensor, "*layer"]:
    """What is left of y after the best rotation of x (orthogonal Procrustes, Schönemann 1966): a share, 0 to 1.

    With `scaling` x may be stretched too: min over s, R of ||s xR - y||² / ||y||² = 1 - (||x'y||_* / (||x|| ||y||))²,
    the nuclear norm on top; it is symmetric. Without: min over R of ||xR - y||² / (||x||² + ||y||²)
    = 1 - 2 ||x'y||_* / (||x||² + ||y||²), which tells clouds of different size apart.
    `centre` moves both means to 0 first. Where the widths differ the narrower cloud is padded with zeros.
    NaN where a cloud is a single point. Raises `SurgeryError` when the examples differ in number.
    """

    def of(a: Tensor, b: Tensor) -> Tensor:
        a2, b2 = a.square().sum(), b.square().sum()
        if not (a2 > 0 and b2 > 0):
            return a2.new_tensor(torch.nan)
        shared = torch.linalg.svdvals(_product(a, b)).sum()
        return (1 - shared**2 / (a2 * b2) if scaling else 1 - 2 * shared / (a2 + b2)).clamp(0, 1)

    return _by_layer(of, x, y, least=1, what="The Procrustes residual", centre=centre)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """A matrix with the singular values of x'y: of the triangles of x' = QR and y' = QR when there are few rows."""
    if len(x) >= max(x.shape[1], y.shape[1]):
        return x.T @ y
    r, s = (torch.linalg.qr(cloud.T, mode="r").R for cloud in (x, y))
    return r @ s.T


@torch.no_grad()
def rotation(x: Float[Tensor, "*layer example d"], y: Float[Tensor, "*layer example d"]) -> Float[Tensor, "*layer d d"]:
    """The orthogonal R that brings xR nearest to y, in float64; nothing is centred. Raises when the shapes differ."""
    if x.shape != y.shape:
        raise SurgeryError(f"A rotation needs two clouds of one shape: found {tuple(x.shape)} and {tuple(y.shape)}.")

    def of(a: Tensor, b: Tensor) -> Tensor:
        u, _, vh = torch.linalg.svd(a.T @ b)
        return u @ vh

    return _by_layer(of, x, y, least=1, what="A rotation", centre=False)


@torch.no_grad()
def cosine(x: Float[Tensor, "*row d"], y: Float[Tensor, "*row d"]) -> Float[Tensor, "*row"]:
    """Cosine of each row of x with the same row of y; NaN where a row is zero. Raises when the shapes differ."""
    if x.shape != y.shape:
        raise SurgeryError(f"Cosines by row need one shape: found {tuple(x.shape)} and {tuple(y.shape)}.")

    def of(a: Tensor, b: Tensor) -> Tensor:
        return ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).clamp(-1, 1)

    return _by_row(of, x, y)


class Principal(NamedTuple):
    """What `principal` finds: k directions, the one of most variance first."""

    components: Float[Tensor, "*layer k d"]
    """Orthonormal rows. The entry of largest size is positive, so that the sign is the same everywhere."""
    variance: Float[Tensor, "*layer k"]
    """Variance along each (n - 1; without centring the mean square, n)."""
    explained: Float[Tensor, "*layer k"]
    """Its share of all variance (of all mean square); NaN when there is none."""
    mean: Float[Tensor, "*layer d"]
    """What was subtracted: zeros without centring."""


@torch.no_grad()
def principal(x: Float[Tensor, "*layer example d"], k: int = 10, *, centre: bool = True) -> Principal:
    """Principal directions of rows, as of the differences x_tuned - x_base. Without `centre` their mean counts too.

    Raises `SurgeryError` when rows of this number and width have fewer than k components.
    """
    n, d = x.shape[-2:]
    most = min(n - 1 if centre else n, d)
    if not 1 <= k <= most:
        raise SurgeryError(f"PCA of {n} rows of width {d} has 1 to {most} components: {k} were asked for.")

    def of(rows: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        mean = rows.mean(0) if centre else rows.new_zeros(d)
        rows = rows - mean
        if n < d:  # a QR first, so that what is decomposed is square in the smaller of n and d
            q, r = torch.linalg.qr(rows.T)
            _, s, vh = torch.linalg.svd(r.T)
            vh = vh @ q.T
        else:
            _, s, vh = torch.linalg.svd(torch.linalg.qr(rows, mode="r").R)
        signs = vh.gather(1, vh.abs().argmax(1, keepdim=True)).sign()
        variance = s.square() / (n - 1 if centre else n)
        return (vh * signs)[:k], variance[:k], (variance / variance.sum())[:k], mean

    found = [of(*pair) for pair in _pairs(x, x, least=1, what="PCA", centre=False)]
    parts = (torch.stack(part) for part in zip(*found, strict=True))
    return Principal(*(part.reshape((*x.shape[:-2], *part.shape[1:])) for part in parts))


def _pairs(x: Tensor, y: Tensor, *, least: int, what: str, centre: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Clouds in float64, layer by layer. Raises when they don't fit, are too small or hold NaN."""
    if x.ndim < 2 or x.shape[:-1] != y.shape[:-1]:
        raise SurgeryError(f"{what} needs clouds (..., examples, width) of the same examples: found shapes "
                           f"{tuple(x.shape)} and {tuple(y.shape)}.")  # fmt: skip
    if x.shape[-2] < least:
        raise SurgeryError(f"{what} needs at least {least} examples: found {x.shape[-2]}.")
    layers = zip(x.reshape(-1, *x.shape[-2:]), y.reshape(-1, *y.shape[-2:]), strict=True)
    for layer, (a, b) in enumerate(layers):
        a, b = a.double(), b.double()
        if not (a.isfinite().all() and b.isfinite().all()):
            where = f" in layer {layer} of the batch" if x.ndim > 2 else ""
            raise SurgeryError(f"{what} is not defined for NaN or infinite activations: found some{where}.")
        yield (a - a.mean(0), b - b.mean(0)) if centre else (a, b)


def _by_layer(
    of: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, *, least: int, what: str, centre: bool = True
) -> Tensor:
    values = torch.stack([of(a, b) for a, b in _pairs(x, y, least=least, what=what, centre=centre)])
    return values.reshape((*x.shape[:-2], *values.shape[1:]))


# ---- attention patterns and predictions


@torch.no_grad()
def attention_js(
    f: Float[Tensor, "*head dst src"], b: Float[Tensor, "*head dst src"], mask: Bool[Tensor, "*head src"] | None = None
) -> Float[Tensor, "*head dst"]:
    """Jensen-Shannon divergence in nats of each query's attention in two models, (..., query) with 0 where masked.

    A query looks at positions up to its own: what a pattern has beyond (or at masked positions) counts 0, whatever it
    is. `mask` is true at real tokens and has the shape (..., position), broadcast over heads: (batch, 1, position) for
    (batch, head, dst, src). The first real token looks at itself alone, so its divergence is 0 by definition.
    Raises `SurgeryError` when the shapes differ or there are more queries than positions.
    """
    if f.shape != b.shape or f.ndim < 2 or f.shape[-2] > f.shape[-1]:
        raise SurgeryError(f"Attention patterns must both be (..., query, position), with no more queries than "
                           f"positions: found shapes {tuple(f.shape)} and {tuple(b.shape)}.")  # fmt: skip
    queries, positions = f.shape[-2:]
    seen = torch.ones(queries, positions, dtype=torch.bool, device=f.device).tril(positions - queries)
    if mask is not None:
        real = mask.to(f.device, torch.bool)
        seen = seen & real[..., None, :] & real[..., positions - queries :, None]
    seen = seen.broadcast_to(f.shape)

    def of(p: Tensor, q: Tensor, keep: Tensor) -> Tensor:
        return _js(p.where(keep > 0, 0.0).log(), q.where(keep > 0, 0.0).log())

    return _by_row(of, f, b, seen)


@torch.no_grad()
def kl(f: Float[Tensor, "*row vocab"], b: Float[Tensor, "*row vocab"]) -> Float[Tensor, "*row"]:
    """KL(f || b) = sum_v p_f (log p_f - log p_b) in nats of next-token logits, "f given b", by row.

    Never negative. A token that f rules out (logit -inf) adds nothing; one that only b rules out makes it infinite.
    Raises `SurgeryError` when the shapes differ, or a row is no distribution (NaN, or -inf throughout).
    """

    def of(f: Tensor, b: Tensor) -> Tensor:
        f, b = f.log_softmax(-1), b.log_softmax(-1)
        return torch.where(f.isneginf(), 0.0, f.exp() * (f - b)).sum(-1).clamp(min=0)

    _check_logits(f, b)
    return _by_row(of, f, b)


@torch.no_grad()
def js(f: Float[Tensor, "*row vocab"], b: Float[Tensor, "*row vocab"]) -> Float[Tensor, "*row"]:
    """Jensen-Shannon divergence of next-token logits in nats, by row: 0 to log 2, symmetric. Raises as `kl` does."""
    _check_logits(f, b)
    return _by_row(lambda f, b: _js(f.log_softmax(-1), b.log_softmax(-1)), f, b)


def agreement(f: Float[Tensor, "*row vocab"], b: Float[Tensor, "*row vocab"]) -> Bool[Tensor, "*row"]:
    """Whether both find the same token most likely (of equal logits the first counts). Raises as `kl` does."""
    _check_logits(f, b)
    return f.argmax(-1) == b.argmax(-1)


def _js(p: Tensor, q: Tensor) -> Tensor:
    """Of log-probabilities. Each term is at least 0, also where the masses of the rows are not quite 1."""

    def to_middle(x: Tensor, other: Tensor) -> Tensor:  # log x / middle = log 2 - log(1 + other / x): 0 for equals
        ratio = math.log(2) - torch.logaddexp(torch.zeros_like(x), other - x)
        return torch.where(x.isneginf(), 0.0, x.exp() * ratio)

    return (to_middle(p, q) + to_middle(q, p)).sum(-1).div(2).clamp(0, math.log(2))


def _check_logits(f: Tensor, b: Tensor) -> None:
    if f.shape != b.shape or f.ndim < 1:
        raise SurgeryError(f"Logits of two models must have one shape: found {tuple(f.shape)} and {tuple(b.shape)}.",
                           hint="With vocabularies of different size, compare the tokens that both have.")  # fmt: skip
    for name, logits in (("first", f), ("second", b)):
        best = logits.amax(-1)  # NaN if any is
        if not best.isfinite().all():
            row = int((~best.isfinite()).reshape(-1).nonzero()[0])
            raise SurgeryError(f"Row {row} of the {name} logits is no distribution: its largest value is "
                               f"{best.reshape(-1)[row].item()}.")  # fmt: skip


def _by_row(of: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`of` on blocks of rows in float64, each reduced to a number, so that no second copy of the whole is made."""
    rows, width = tensors[0].shape[:-1], tensors[0].shape[-1]
    flat = [t.reshape(-1, width) for t in tensors]
    step = max(1, BLOCK // max(1, width))
    parts = [of(*(t[i : i + step].double() for t in flat)) for i in range(0, len(flat[0]), step)]
    return torch.cat(parts).reshape(rows) if parts else torch.empty(rows, dtype=torch.float64)


# ---- two samples of a number


class Auc(NamedTuple):
    """An area under the ROC curve and its 95 % interval; arrays when the samples have more axes than examples."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    standard_error: np.ndarray
    """DeLong's, 0 where the samples don't overlap."""


def placements(upper: Any, lower: Any) -> tuple[np.ndarray, np.ndarray]:
    """For each of `upper` the share of `lower` below it, for each of `lower` the share of `upper` above; ties half.

    Shapes (m, ...) and (n, ...), examples first. Both means are the AUC (DeLong et al. 1988; by ranks, Sun & Xu 2014).
    """
    from scipy.stats import rankdata

    u, v = _sample(upper), _sample(lower)
    if u.shape[1:] != v.shape[1:]:
        raise SurgeryError(f"An AUC compares samples of one shape but for their number: found {u.shape} and {v.shape}.")
    ranks = rankdata(np.concatenate([u, v]), axis=0)
    return (ranks[: len(u)] - rankdata(u, axis=0)) / len(v), 1 - (ranks[len(u) :] - rankdata(v, axis=0)) / len(u)


def auc(upper: Any, lower: Any) -> Auc:
    """Probability that one of `upper` exceeds one of `lower`, ties counted half (Mann-Whitney), with a 95 % interval.

    Arrays or tensors of shapes (m, ...) and (n, ...), examples first. The interval is DeLong's on the logit scale
    (advised by Perme & Manevski 2019: it stays within 0 and 1). Where that would be a point, as of samples that don't
    overlap, it is Newcombe's (2006, method 5), which knows how few examples said so.
    Raises `SurgeryError` for an empty sample, for samples that differ in more than their number, and for NaN.
    """
    above, below = placements(upper, lower)
    m, n = len(above), len(below)
    value = above.mean(0)
    if min(m, n) < 2:
        return Auc(value, *_newcombe(value, m, n), np.full_like(value, np.nan)[()])
    error = np.sqrt(above.var(0, ddof=1) / m + below.var(0, ddof=1) / n)
    with np.errstate(divide="ignore", invalid="ignore"):
        logit, spread = np.log(value / (1 - value)), Z95 * error / (value * (1 - value))
    ends = 1 / (1 + np.exp(spread - logit)), 1 / (1 + np.exp(-spread - logit))
    low, high = (np.where(error > 1e-12, *pair) for pair in zip(ends, _newcombe(value, m, n), strict=True))
    return Auc(value, low[()], high[()], error)


def _newcombe(value: np.ndarray, m: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Where |t - value| = z sd(t), with Hanley and McNeil's sd of an AUC t and (m + n) / 2 for both numbers in it."""
    extra = (m + n) / 2 - 1

    def end(outer: float) -> np.ndarray:
        inner, outer_ = np.array(value, dtype=float), np.full(np.shape(value), outer)
        for _ in range(60):  # bisection: too near to the value it is within z sd, too far it is not
            t = (inner + outer_) / 2
            variance = t * (1 - t) * (1 + extra * ((1 - t) / (2 - t) + t / (1 + t))) / (m * n)
            near = (t - value) ** 2 <= Z95**2 * variance
            inner, outer_ = np.where(near, t, inner), np.where(near, outer_, t)
        return inner[()]

    return end(0.0), end(1.0)


def _sample(values: Any) -> np.ndarray:
    """float64 with the examples first. Raises for none and for NaN."""
    values = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=float)
    if values.ndim == 0 or not len(values) or np.isnan(values).any():
        raise SurgeryError("An AUC needs at least one number in each sample, and none that is NaN.")
    return values
