"""The pass under `analysis.geometry`: what is counted and summed over one tensor of a family of task vectors.

Every number is a sum (or a maximum) over elements, so that sums of a layer, a kind of module or the model are sums of
sums. A tensor is read twice, in chunks that stay in cache: once for the sums, the histograms and from them the
threshold of the largest elements, once for what lies above it. Chunks are added up in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from analysis.family import BLOCK, Family
from surgery.checkpoint.header import torch_dtype
from surgery.weights.streams import Workspace

ULP_BINS = 32
LOWEST_ULP = -8
"""Bin i of the histogram counts 2**(i-8) <= |d|/ulp(B) < 2**(i-7); the first and the last bin are open."""

MAXIMA = ("linf",)
"""Fields that are combined by their maximum; all others by addition."""


def empty_sums(vectors: int, tensors: int | None = None) -> dict[str, np.ndarray]:
    """Zeros for every field, float64, K = `vectors`; with `tensors` a leading axis. B base, d_i vectors:

    | field               | shape   | sum over elements of                                                   |
    |---------------------|---------|------------------------------------------------------------------------|
    | numel, base_square  |         | 1, B²                                                                  |
    | base_dot            | K       | B d_i                                                                  |
    | gram                | K, K    | d_i d_j                                                                |
    | first, third, fourth| K       | d_i, d_i³, d_i⁴                                                        |
    | l1, linf            | K       | abs(d_i); its maximum                                                  |
    | signs, both         | K, K    | sign(d_i) sign(d_j); both are non-zero                                 |
    | any_conflict        |         | some d_i > 0 and some d_j < 0                                          |
    | ulps                | K, bins | abs(d_i) in units of the last place of B, by powers of two             |
    | top                 | K, K    | d_i and d_j are both among the largest of their tensor                 |
    | trimmed, elected    | K       | d_i² where d_i is among the largest; and has the sign elected by those |
    | rounding            |         | (round(B + mean d) - (B + mean d))²                                    |
    """
    k = vectors
    shapes: dict[str, tuple[int, ...]] = {
        "numel": (), "base_square": (), "base_dot": (k,), "gram": (k, k), "first": (k,), "third": (k,), "fourth": (k,),
        "l1": (k,), "linf": (k,), "signs": (k, k), "both": (k, k), "any_conflict": (), "ulps": (k, ULP_BINS),
        "top": (k, k), "trimmed": (k,), "elected": (k,), "rounding": (),
    }  # fmt: skip
    lead = () if tensors is None else (tensors,)
    return {name: np.zeros(lead + shape) for name, shape in shapes.items()}


@dataclass
class Found:
    """The sums of one tensor, and how many numbers of the base and of each vector were not finite."""

    sums: dict[str, np.ndarray]
    nonfinite: list[int]


def sweep(family: Family, density: float, work: Workspace) -> Found:
    """All sums of one tensor. `density` is the share of elements that counts as the largest.

    The largest of a tensor are those with |d| >= t, t being the magnitude of rank density * numel rounded down to 8
    significant bits; zeros never belong to them. So equal magnitudes are in or out together: where the storage type
    leaves few different magnitudes, an exact count would be decided by the order of the elements.
    """
    found = Found(empty_sums(len(family.vectors)), [0] * (len(family.vectors) + 1))
    histogram = np.zeros((len(family.vectors), 1 << 15), dtype=np.int64)
    for numbers, real in family.chunks(work):
        _add_up(found, histogram, numbers, real, family.dtype, work)
    if not any(found.nonfinite):
        bars = [_threshold(counts, density, family.rows * family.cols) for counts in histogram]
        for numbers, _ in family.chunks(work):
            _add_largest(found.sums, numbers[1:], bars, work)
    return found


def _scratch(work: Workspace, key: str, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return work.take(key, like.numel(), dtype).view(like.shape)


def _gram(rows: Tensor) -> np.ndarray:
    """Dot products of all pairs of rows: float32 within a block, float64 over the blocks."""
    blocks = rows.unflatten(1, (-1, BLOCK)).transpose(0, 1)
    return torch.bmm(blocks, blocks.transpose(1, 2)).sum(0, dtype=torch.float64).numpy()


def _total(rows: Tensor) -> np.ndarray:
    """The sum of every row."""
    return rows.unflatten(1, (-1, BLOCK)).sum(2).sum(1, dtype=torch.float64).numpy()


def _dot(a: Tensor, b: Tensor, work: Workspace) -> np.ndarray:
    """Row by row a · b."""
    return _total(torch.mul(a, b, out=_scratch(work, "product", a)))


def _add_up(found: Found, histogram: np.ndarray, numbers: Tensor, real: int, dtype: str, work: Workspace) -> None:
    """Adds one chunk to every sum that needs no threshold, and to the histogram of magnitudes."""
    sums, base, d = found.sums, numbers[0], numbers[1:]
    magnitude = torch.abs(d, out=_scratch(work, "magnitude", d))
    linf = magnitude.amax(1)
    if not bool(linf.isfinite().all()) or not bool(base.abs().amax().isfinite()):
        found.nonfinite = [n + int((~row.isfinite()).sum()) for n, row in zip(found.nonfinite, numbers, strict=True)]
        return
    gram = _gram(numbers)
    sums["numel"] += real
    sums["base_square"] += gram[0, 0]
    sums["base_dot"] += gram[0, 1:]
    sums["gram"] += gram[1:, 1:]
    sums["l1"] += _total(magnitude)
    np.maximum(sums["linf"], linf.numpy(), out=sums["linf"])
    _add_magnitudes(sums["ulps"], histogram, base[:real], magnitude[:, :real], dtype, work)

    square = torch.mul(d, d, out=magnitude)
    sums["first"] += _total(d)
    sums["third"] += _dot(square, d, work)
    sums["fourth"] += _dot(square, square, work)

    sign = torch.sign(d, out=magnitude)
    sums["signs"] += _gram(sign)
    if len(d) > 1:
        up = torch.amax(sign, 0, out=_scratch(work, "up", base)).clamp_(min=0)
        down = torch.amin(sign, 0, out=_scratch(work, "down", base)).clamp_(max=0)
        sums["any_conflict"] -= _dot(up[None], down[None], work)[0]
    sums["both"] += _gram(sign.abs_())

    mean = torch.mean(d, 0, out=_scratch(work, "up", base))
    moved = torch.add(base, mean, out=_scratch(work, "down", base))
    stored = _scratch(work, "stored", base, torch_dtype(dtype)).copy_(moved)
    # (stored - B) - mean: both differences are of near numbers, so that float32's own rounding is seen as well.
    lost = moved.copy_(stored).sub_(base).sub_(mean)
    sums["rounding"] += _dot(lost[None], lost[None], work)[0]


def _add_magnitudes(
    ulps: np.ndarray, histogram: np.ndarray, base: Tensor, magnitude: Tensor, dtype: str, work: Workspace
) -> None:
    """Counts |d| by its upper 16 bits (the order of the numbers is that of the bits), and by its size in ulps of B.

    The ulp of B is 2**(exponent of B - mantissa bits), so floor(log2(|d|/ulp(B))) is a difference of exponents.
    """
    info = torch.finfo(torch_dtype(dtype))
    mantissa, least = round(-np.log2(info.eps)), max(1, round(127 + np.log2(info.smallest_normal)))
    places = _scratch(work, "places", base, torch.int32).copy_(base.view(torch.int32))
    places.bitwise_right_shift_(23).bitwise_and_(0xFF).clamp_(min=least).add_(LOWEST_ULP - mantissa)
    for i, row in enumerate(magnitude):
        bits = torch.bitwise_right_shift(row.view(torch.int32), 16, out=_scratch(work, "bits", base, torch.int32))
        histogram[i] += torch.bincount(bits, minlength=1 << 15).numpy()
        bits.bitwise_right_shift_(7).sub_(places).clamp_(0, ULP_BINS - 1)
        ulps[i] += torch.bincount(bits, minlength=ULP_BINS).numpy()


def _threshold(counts: np.ndarray, density: float, numel: int) -> float:
    """The magnitude of rank density * numel, rounded down to 8 significant bits, from a histogram; never 0."""
    wanted = max(1, int(density * numel))
    above = counts[::-1].cumsum()[::-1]
    bucket = max(1, int(np.searchsorted(-above, -wanted, side="right")) - 1)
    return float(np.array([bucket << 16], dtype=np.uint32).view(np.float32)[0])


def _add_largest(sums: dict[str, np.ndarray], d: Tensor, bars: Sequence[float], work: Workspace) -> None:
    """Adds one chunk to the overlaps of the largest elements, and to the norms left by trimming and by election.

    TIES (arXiv:2306.01708), equations of section 3: trim, elect the sign of the sum (0 counts as +), keep who agrees.
    """
    largest = _scratch(work, "magnitude", d)
    for row, bar, out in zip(d, bars, largest, strict=True):
        torch.ge(torch.abs(row, out=out), bar, out=out)
    sums["top"] += _gram(largest)
    trimmed = largest.mul_(d)
    sums["trimmed"] += _dot(trimmed, trimmed, work)
    elected = torch.sum(trimmed, 0, out=_scratch(work, "up", d[0])).sign_().add_(0.5).sign_()
    agreeing = trimmed.mul_(elected).clamp_(min=0)
    sums["elected"] += _dot(agreeing, agreeing, work)
