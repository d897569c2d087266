"""Low-rank pictures of vectors: randomised SVD of streamed differences, and expressions of low rank.

A matrix is never held whole: it is multiplied block of rows by block of rows, in float32. Halko, Martinsson and Tropp,
arXiv:0909.4061, algorithms 4.4 and 5.1 (10 more columns than asked for, 2 power iterations with QR between them).
What is lost is known exactly without the whole spectrum, from ||D||_F: captured = sum_{i<=r} s_i^2 / ||D||_F^2.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.weights.expression import Expression, Shapes
from surgery.weights.sparsify import derive_key
from surgery.weights.streams import one_torch_thread

OVERSAMPLE, ITERATIONS = 10, 2
WORK = 1 << 18
"""Numbers of a block that is multiplied at once."""
ROWS = 64
"""A product is read in blocks of these rows always, so that its bits don't depend on which rows are asked for."""


@dataclass(frozen=True)
class Factors:
    """D (m x n) ~ left @ right: `left` m x r with orthogonal columns of length s_i, `right` r x n, orthonormal rows.

    `values` are the singular values s, `norm` is ||D||_F and `captured` the share of its square that is kept.
    """

    left: Tensor
    right: Tensor
    values: Tensor
    norm: float

    @property
    def rank(self) -> int:
        return len(self.values)

    @property
    def captured(self) -> float:
        return min(1.0, float(self.values.double().square().sum()) / self.norm**2) if self.norm else 1.0

    def first(self, rank: int) -> Factors:
        """The leading `rank` of them."""
        return Factors(self.left[:, :rank], self.right[:rank], self.values[:rank], self.norm)

    def rank_for(self, energy: float) -> int | None:
        """The smallest rank that captures `energy` (a share of ||D||_F^2); None when all of them do not."""
        kept = self.values.double().square().cumsum(0)
        enough = (kept >= energy * self.norm**2 * (1 - 1e-9)).nonzero()
        return int(enough[0]) + 1 if enough.numel() else None


Matrix = Callable[[int, int], Tensor]
"""Rows `start:stop` of an m x n matrix, float32."""


def decompose(
    rows: Matrix, m: int, n: int, *, rank: int | None = None, energy: float | None = None, seed: int = 0
) -> Factors:
    """The truncated SVD of a streamed m x n matrix: `rank` values, or as few as capture `energy` (0 to 1].

    Deterministic for a seed. Where about half of all values are wanted, the exact SVD of the whole matrix is taken.
    """
    smallest = min(m, n)
    if (rank is None) == (energy is None):
        raise SurgeryError("Give either a rank or an energy.")
    if rank is not None and rank < 1:
        raise SurgeryError(f"The rank is {rank}; at least 1 is needed.")
    if energy is not None and not 0 < energy <= 1:
        raise SurgeryError(f"The energy is {energy}; it is a share, above 0 and at most 1.")
    wanted = min(smallest, rank if rank is not None else 16)
    with one_torch_thread(), torch.no_grad():
        while True:
            if 2 * (wanted + OVERSAMPLE) >= smallest:
                found = _exact(rows, m, n)
            else:
                found = _randomised(rows, m, n, wanted, seed)
            if energy is None:
                return found.first(wanted)
            enough = found.rank_for(energy)
            if enough is not None or found.rank == smallest:
                return found.first(enough or smallest)
            wanted = min(smallest, 2 * wanted)


def _blocks(rows: Matrix, m: int, n: int) -> Iterator[tuple[int, int, Tensor]]:
    step = max(1, WORK // max(1, n))
    for start in range(0, m, step):
        stop = min(m, start + step)
        yield start, stop, rows(start, stop)


def _exact(rows: Matrix, m: int, n: int) -> Factors:
    whole = rows(0, m)
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    return Factors(u * s, v, s, float(torch.linalg.vector_norm(whole, dtype=torch.float64)))


def _randomised(rows: Matrix, m: int, n: int, rank: int, seed: int) -> Factors:
    """The leading `rank` and `OVERSAMPLE` further triplets; the trailing ones are rough."""
    width = rank + OVERSAMPLE
    generator = torch.Generator().manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
    right = torch.randn(n, width, generator=generator)
    square = 0.0
    left = torch.empty(m, width)
    for turn in range(ITERATIONS + 1):
        following = torch.zeros(n, width)
        for start, stop, block in _blocks(rows, m, n):
            torch.mm(block, right, out=left[start:stop])
            if turn == 0:
                square += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
        q = torch.linalg.qr(left).Q
        for start, stop, block in _blocks(rows, m, n):
            following.addmm_(block.T, q[start:stop])
        if turn < ITERATIONS:
            right = torch.linalg.qr(following).Q
    u, s, v = torch.linalg.svd(following.T, full_matrices=False)  # Q^T D, small
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    return Factors((q @ u) * s, v, s, math.sqrt(square))


def truncate(left: Tensor, right: Tensor, *, rank: int | None = None, energy: float | None = None) -> Factors:
    """The exact truncated SVD of the product `left @ right` (m x R, R x n), never dense: QR of both, SVD of R x R."""
    with one_torch_thread(), torch.no_grad():
        q, a = torch.linalg.qr(left.double())
        p, b = torch.linalg.qr(right.double().T)
        u, s, v = torch.linalg.svd(a @ b.T)
        found = Factors(((q @ u) * s).float(), (v @ p.T).float(), s.float(), float(s.square().sum().sqrt()))
        if energy is not None:
            rank = found.rank_for(energy) or found.rank
        significant = int((s > s.max() * 1e-7).sum()) if len(s) and float(s.max()) > 0 else 0
        return found.first(max(1, min(rank or found.rank, significant)))


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of `shape` can be written as a product of two thinner ones."""
    return len(shape) == 2 and min(shape) > 1


def rows_of(expression: Expression, name: str) -> Matrix:
    """One tensor of an expression as a streamed matrix."""
    n = expression.shapes[name][1]
    return lambda start, stop: expression.flat(name, start * n, stop * n).view(-1, n)


def factorise(
    expression: Expression, name: str, *, rank: int | None = None, energy: float | None = None, seed: int = 0
) -> Factors:
    """The truncated SVD of one tensor: exact where its factors are known (adapters, sums of them), else randomised."""
    known = expression.factors(name)
    if known is not None:
        return truncate(*known, rank=rank, energy=energy)
    m, n = expression.shapes[name]
    key = derive_key(seed, "low rank", name)
    return decompose(rows_of(expression, name), m, n, rank=rank, energy=energy, seed=key)


def product(left: Tensor, right: Tensor, start: int, stop: int) -> Tensor:
    """Numbers `start:stop` of `left @ right`, flat, the same bits for any range."""
    n = right.shape[1]
    out = torch.empty(stop - start)
    for row in range(start // n // ROWS * ROWS, -(-stop // n), ROWS):
        block = (left[row : row + ROWS] @ right).view(-1)
        low, high = max(start, row * n), min(stop, row * n + block.numel())
        out[low - start : high - start] = block[low - row * n : high - row * n]
    return out


@dataclass(frozen=True, eq=False)
class LowRank(Expression):
    """`part` with every matrix replaced by its best approximation of a rank; other tensors stay as they are."""

    part: Expression
    rank: int | None = None
    energy: float | None = None
    seed: int = 0
    _found: dict[str, Factors] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def shapes(self) -> Shapes:  # type: ignore[override]
        return self.part.shapes

    def decomposed(self, name: str) -> Factors:
        """The factors of one matrix, with what they capture; made when first asked for, and kept."""
        if name not in self._found:
            made = factorise(self.part, name, rank=self.rank, energy=self.energy, seed=self.seed)
            with self._lock:
                self._found.setdefault(name, made)
        return self._found[name]

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        if not is_matrix(self.shapes[name]):
            return None
        found = self.decomposed(name)
        return found.left, found.right

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        known = self.factors(name)
        return self.part.flat(name, start, stop) if known is None else product(*known, start, stop)

    def parts(self) -> tuple[Expression, ...]:
        return (self.part,)

    def over(self, change: Callable[[Expression], Expression]) -> Expression:
        return replace(self, part=self.part.over(change), _found={}, _lock=threading.Lock())

    def key(self) -> Any:
        return self.part, self.rank, self.energy, self.seed

    def __str__(self) -> str:
        return f"({self.part}).low_rank({f'rank={self.rank}' if self.rank else f'energy={self.energy:g}'})"
