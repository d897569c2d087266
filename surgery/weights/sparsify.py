"""Which elements of a task vector are kept: exact, deterministic masks in their plainest form.

Everything here is a rule on one tensor of differences `d` (any shape, flat index = row-major order). The functions
return boolean masks of the shape of `d`; nothing is scaled. Magnitude rules are built on one small vocabulary, the
`Selection`, which is also what the streaming kernels compute (by radix instead of by `kthvalue`):

    keep |d| > threshold, and the first `quota` of the elements whose |d| equals it.

Equal magnitudes are the normal case: bfloat16 checkpoints quantise a difference to a few ulps of the weight, and at
usual densities the elements equal to the threshold can outnumber those above it. `ties` says what happens to them:

    "index"   exactly k are kept, the lowest flat index first: what a stable sort does (the default)
    "random"  exactly k are kept, evenly spread over the tied ones, from a place that the key decides
    "all"     every tied element is kept: at least k (inclusive threshold, as in the code of TIES)
    "none"    no tied element is kept: fewer than k (strict threshold)

Randomness is counter-based: element i always sees the same bits of the stream `key`, whatever the chunks or threads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from surgery.errors import SurgeryError

Ties = Literal["index", "all", "none", "random"]

SMALLEST_16_BIT_DENSITY = 0.01
"""Below this keep probability a mask takes 32 random bits an element: 1/65536 would be a coarse step."""


class Selection(NamedTuple):
    """The elements kept by magnitude. (inf, 0) keeps nothing, (-1.0, 0) keeps everything."""

    threshold: float
    """Elements of larger magnitude are kept."""
    quota: int
    """How many of the elements of exactly this magnitude are kept, lowest flat index first."""


NOTHING = Selection(float("inf"), 0)
EVERYTHING = Selection(-1.0, 0)


def fraction(value: float, name: str) -> float:
    """`value` if it lies in [0, 1]; raises `SurgeryError` naming the parameter otherwise (NaN included)."""
    if not 0.0 <= value <= 1.0:
        raise SurgeryError(f"'{name}' must lie between 0 and 1, found {value}.", hint="It is a share of the elements.")
    return float(value)


def kept(density: float, n: int) -> int:
    """How many of `n` elements a density keeps: int(density * n), truncated as mergekit truncates, but at least one.

    A tensor of 3 elements at density 0.2 keeps 1; only an explicit density of 0 keeps nothing.
    Raises `SurgeryError` for a density outside [0, 1].
    """
    density = fraction(density, "density")
    return 0 if density == 0 or n == 0 else max(1, int(density * n))


def band_counts(n: int, density: float, top: float, bottom: float | None = None) -> tuple[int, int]:
    """(kept, removed from the top) of a band over `n` elements: t = int(density * n), g = min(int(top * n), n - t).

    `bottom`, the share of smallest elements removed, replaces `density` when given: t = n - int(bottom * n) - g.
    When density and top together exceed 1, density wins. Raises `SurgeryError` for shares outside [0, 1].
    """
    removed = int(fraction(top, "top") * n)
    if bottom is not None:
        return max(0, n - int(fraction(bottom, "bottom") * n) - removed), removed
    wanted = int(fraction(density, "density") * n)
    return wanted, min(removed, n - wanted)


def select(magnitudes: Tensor, k: int, ties: Ties = "index") -> Selection:
    """The selection of the `k` largest of `magnitudes` (any shape, non-negative).

    k <= 0 keeps nothing and k >= n everything, whatever `ties`. Under "random" the quota is that of "index":
    which of the tied elements fill it is `apply_selection`'s work. Raises `SurgeryError` for NaN or infinite values.
    """
    flat = magnitudes.reshape(-1)
    if not bool(torch.isfinite(flat).all()):
        bad = int((~torch.isfinite(flat)).sum())
        raise SurgeryError(f"{bad} of {flat.numel()} differences are NaN or infinite: their magnitudes have no order.")
    if k <= 0:
        return NOTHING
    if k >= flat.numel():
        return EVERYTHING
    threshold = torch.kthvalue(flat, flat.numel() - k + 1).values
    if ties == "none":
        return Selection(threshold.item(), 0)
    if ties == "all":
        return Selection(threshold.item(), int((flat == threshold).sum()))
    return Selection(threshold.item(), k - int((flat > threshold).sum()))


def select_model(deltas: Sequence[Tensor], density: float, ties: Ties = "index") -> list[Selection]:
    """One selection over all tensors of a model together (TIES as its authors trim): one `Selection` a tensor.

    They share the threshold; the quota is used up in the order of `deltas`. Raises `SurgeryError` for ties="random".
    """
    if ties == "random":
        raise SurgeryError("ties='random' is not defined for scope='model'.", hint="Use 'index', 'all' or 'none'.")
    flat = torch.cat([d.reshape(-1).abs() for d in deltas])
    whole = select(flat, kept(density, flat.numel()), ties)
    shares, left = [], whole.quota
    for d in deltas:
        share = min(left, int((d.abs() == whole.threshold).sum()))
        shares.append(Selection(whole.threshold, share))
        left -= share
    return shares


def apply_selection(d: Tensor, selection: Selection, ties: Ties = "index", key: int | None = None) -> Tensor:
    """The mask of a selection over `d`. With ties="random" the `key` (64 bits) decides among the tied elements.

    Of E tied elements, numbered j from 0, those are kept where floor((j + key % E) * quota / E) is about to step:
    exactly `quota` of any E consecutive numbers, at even distances.
    """
    flat = d.reshape(-1).abs()
    mask = flat > selection.threshold
    if selection.quota:
        tied = (flat == selection.threshold).nonzero().squeeze(-1)
        place = torch.arange(tied.numel())
        if ties == "random":
            place += _needed(key) % tied.numel()
            step = (place + 1) * selection.quota // tied.numel() > place * selection.quota // tied.numel()
            mask[tied[step]] = True
        else:
            mask[tied[place < selection.quota]] = True
    return mask.reshape(d.shape)


def magnitude(d: Tensor, density: float, ties: Ties = "index", key: int | None = None) -> Tensor:
    """Mask of the `kept(density, n)` elements of largest |d|. TIES, arXiv:2306.01708, section 3 (trim)."""
    return apply_selection(d, select(d.abs(), kept(density, d.numel()), ties), ties, key)


def band(
    d: Tensor,
    density: float = 1.0,
    top: float = 0.0,
    *,
    bottom: float | None = None,
    scope: Literal["tensor", "row"] = "tensor",
    ties: Ties = "index",
    key: int | None = None,
) -> Tensor:
    """Mask without the largest `top` and without the smallest: the t + g largest minus the g largest.

    Counts as in `band_counts`. `scope="row"` treats each row (last dimension; a 1-D tensor is one row) by itself and
    leaves a 0-D tensor alone, as the authors' code does. Model Breadcrumbs, arXiv:2312.06795.
    """
    if scope == "row":
        if d.ndim == 0:
            return torch.ones_like(d, dtype=torch.bool)
        rows = d.reshape(-1, d.shape[-1])
        masks = [band(row, density, top, bottom=bottom, ties=ties, key=key) for row in rows]
        return torch.stack(masks).reshape(d.shape) if masks else torch.ones_like(d, dtype=torch.bool)
    size = d.abs()
    wanted, removed = band_counts(d.numel(), density, top, bottom)
    outer, inner = select(size, wanted + removed, ties), select(size, removed, ties)
    if ties == "random" and outer.threshold == inner.threshold:
        # Two even spreads over the same elements do not nest: spread the wanted number itself.
        even = apply_selection(d, Selection(outer.threshold, wanted), ties, key)
        return even & (size == outer.threshold)
    return apply_selection(d, outer, ties, key) & ~apply_selection(d, inner, ties, key)


def variance(deltas: Sequence[Tensor], density: float, ties: Ties = "index") -> Tensor:
    """Mask of the int(density * nonzero) elements whose (population) variance over the tasks is largest.

    `nonzero` counts the elements with any variance at all. SCE, arXiv:2408.07990 (select).
    """
    density = fraction(density, "density")
    tasks = torch.stack(list(deltas))
    spread = (tasks - tasks.mean(dim=0)).square().mean(dim=0)
    if density == 1:
        return torch.ones_like(spread, dtype=torch.bool)
    return apply_selection(spread, select(spread, int(density * int(spread.count_nonzero())), ties))


def row_rank(d: Tensor, density: float, epsilon: float) -> Tensor:
    """Keep probability of each element: from density - epsilon (smallest of its row) to density + epsilon (largest).

    Linear in the rank of |d| within the row (last dimension; lowest index first among equals); the one element of a
    row of length 1 gets `density`. Raises `SurgeryError` unless both ends lie strictly inside (0, 1); densities of
    exactly 0 and 1 mean nothing and everything. MagPrune of DELLA, arXiv:2406.11617, with epsilon the half width.
    """
    density = fraction(density, "density")
    if density in (0.0, 1.0):
        return torch.full_like(d, density)
    if epsilon < 0 or density - epsilon <= 0 or density + epsilon >= 1:
        raise SurgeryError(
            f"density - epsilon and density + epsilon must lie strictly between 0 and 1, "
            f"found 'density' {density} and 'epsilon' {epsilon}.",
            hint=f"At this density epsilon must be smaller than {min(density, 1 - density):g}.",
        )
    if d.numel() == 0 or d.ndim == 0 or d.shape[-1] == 1:
        return torch.full_like(d, density)
    order = torch.sort(d.abs(), dim=-1, stable=True).indices
    ranks = torch.empty_like(d).scatter_(-1, order, torch.arange(d.shape[-1], dtype=d.dtype).expand_as(d))
    return (density - epsilon) + ranks / (d.shape[-1] - 1) * (2 * epsilon)


def bernoulli(probability: Tensor | float, shape: Sequence[int], key: int, offset: int = 0) -> Tensor:
    """Mask whose elements are kept with `probability` (one number, or a tensor of `shape`), from the stream `key`.

    `offset` is the flat index of the first element, for a mask of a slice. DARE, arXiv:2311.03099.
    Sixteen bits an element, 32 when the smallest probability is below 0.01 (decided per mask: a slice of a tensor
    with differing probabilities must not straddle that limit).
    """
    if not isinstance(probability, Tensor):
        probability = torch.tensor(fraction(probability, "density"), dtype=torch.float64)
    limits = probability.reshape(-1).double().numpy()
    width: Literal[16, 32] = 16 if limits.min(initial=1.0) >= SMALLEST_16_BIT_DENSITY else 32
    bits = random_bits(int(np.prod(shape, dtype=np.int64)), key, offset, width)
    return torch.from_numpy(np.asarray(bits < limits * 2.0**width)).reshape(tuple(shape))


def random_bits(n: int, key: int, offset: int = 0, width: Literal[16, 32] = 16) -> np.ndarray:
    """Elements offset to offset + n of the stream `key` (64-bit): unsigned integers of `width` bits, uniform.

    Word w of the stream is SplitMix64's output for the state key + (w + 1) * gamma (Steele et al. 2014), so any part is
    had without the rest: element i is part i % (64 / width), from the low bits, of word i // (64 / width), and
    random_bits(b - a, key, a) == random_bits(n, key)[a:b] for any a and b. Half the cost of numpy's Philox.
    """
    each = 64 // width
    first, skip = divmod(offset, each)
    words = np.empty(-(-(skip + n) // each), np.uint64)
    shifted = np.empty(min(len(words), len(_STEPS)), np.uint64)
    for start in range(0, len(words), len(_STEPS)):
        z = words[start : start + len(_STEPS)]
        t = shifted[: len(z)]
        np.add(_STEPS[: len(z)], np.uint64((key + (first + start) * _GAMMA) % 2**64), out=z)
        for shift, factor in _MIX:
            np.bitwise_xor(z, np.right_shift(z, shift, out=t), out=z)
            np.multiply(z, factor, out=z)
        np.bitwise_xor(z, np.right_shift(z, 31, out=t), out=z)
    return words.astype("<u8", copy=False).view(f"<u{width // 8}")[skip : skip + n]


_GAMMA = 0x9E3779B97F4A7C15
_STEPS = np.arange(1, (1 << 15) + 1, dtype=np.uint64) * np.uint64(_GAMMA)
_MIX = ((30, np.uint64(0xBF58476D1CE4E5B9)), (27, np.uint64(0x94D049BB133111EB)))


def derive_key(*parts: int | str) -> int:
    """A 64-bit key for a stream, e.g. derive_key(seed, method, input id, tensor name): blake2b of the parts."""
    text = json.dumps(parts, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _needed(key: int | None) -> int:
    if key is None:
        raise SurgeryError("ties='random' needs a key for its random bits.", hint="Pass key=, or keys= to a method.")
    return key
