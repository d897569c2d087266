"""Vectors with most numbers dropped, and vectors merged by a method: expressions that look at a whole tensor.

| `sparsified(method=...)` | keeps                                              | source                        |
|--------------------------|----------------------------------------------------|-------------------------------|
| magnitude                | the largest magnitudes                             | TIES (trim), arXiv:2306.01708 |
| breadcrumbs              | the largest but for the very largest (`top`)       | arXiv:2312.06795              |
| random                   | each with probability `density`, times 1 / density | DARE, arXiv:2311.03099        |

Thresholds are found in two streamed passes (selection.py) when a tensor is first read, and remembered.
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
from surgery.registry import Registry
from surgery.weights.expression import Expression, Shapes
from surgery.weights.selection import cuts
from surgery.weights.sources import ranges
from surgery.weights.sparsify import SMALLEST_16_BIT_DENSITY, band_counts, derive_key, fraction, kept, random_bits
from surgery.weights.streams import Workspace

Keep = Callable[[Tensor, int], Tensor]
"""(numbers of a flat range, its start) -> what is kept of them, zeros elsewhere, in the same memory."""
SPARSIFIERS: Registry[Callable[..., Keep]] = Registry("way to sparsify")
"""Functions (expression, tensor name, density, options) -> Keep."""


@dataclass(frozen=True)
class Threshold:
    """The k largest magnitudes: those above `value`, and those equal to it up to the flat index `last`."""

    value: float
    last: int

    def __call__(self, size: Tensor, start: int) -> Tensor:
        """Which of the magnitudes `size` are among them."""
        mask = size > self.value
        if self.last >= start:
            equal = size == self.value
            equal[self.last - start + 1 :] = False
            mask |= equal
        return mask


def thresholds(expression: Expression, name: str, counts: list[int]) -> list[Threshold]:
    """For each of `counts` the threshold of that many largest magnitudes; equal ones are kept in order of index."""
    numel = math.prod(expression.shapes[name])

    def walk() -> Iterator[list[Tensor]]:
        for start, stop in ranges(numel):
            yield [expression.flat(name, start, stop)]

    found = []
    for cut in cuts(walk, [counts], Workspace())[0]:
        last = -1
        if 0 < cut.quota < cut.equal:
            last = _place(walk(), cut.threshold, cut.quota)
        elif cut.quota:
            last = numel
        found.append(Threshold(cut.threshold, last))
    return found


def _place(chunks: Iterator[list[Tensor]], value: float, count: int) -> int:
    """The flat index of the `count`-th magnitude that equals `value`."""
    start = 0
    for (size,) in chunks:
        places = (size.abs() == value).nonzero().view(-1)
        if places.numel() >= count:
            return start + int(places[count - 1])
        count -= places.numel()
        start += size.numel()
    raise AssertionError("fewer equal magnitudes than were counted")


@SPARSIFIERS.register("magnitude")
def magnitude(expression: Expression, name: str, density: float) -> Keep:
    """The `density` of largest magnitude: exactly max(1, int(density n)), the lowest index first among equals."""
    (lower,) = thresholds(expression, name, [kept(density, math.prod(expression.shapes[name]))])
    return lambda d, start: d.mul_(lower(d.abs(), start))


@SPARSIFIERS.register("breadcrumbs")
def breadcrumbs(expression: Expression, name: str, density: float, top: float = 0.006) -> Keep:
    """The `density` of largest magnitude below the `top` share of the very largest. Model Breadcrumbs, section 3."""
    wanted, removed = band_counts(math.prod(expression.shapes[name]), density, top)
    lower, upper = thresholds(expression, name, [wanted + removed, removed])
    return lambda d, start: d.mul_(lower(d.abs(), start) & ~upper(d.abs(), start))


@SPARSIFIERS.register("random")
def random(expression: Expression, name: str, density: float, seed: int = 0, rescale: str = "expectation") -> Keep:
    """Each number with probability `density`, times 1 / density unless rescale="none"."""
    if rescale not in ("expectation", "none"):
        raise SurgeryError(f"rescale is '{rescale}'; it can be 'expectation' or 'none'.")
    width = 16 if density >= SMALLEST_16_BIT_DENSITY else 32
    key = derive_key(seed, "random", name)
    factor = 1 / density if rescale == "expectation" and density else 1.0

    def keep(d: Tensor, start: int) -> Tensor:
        bits = random_bits(d.numel(), key, start, 16 if width == 16 else 32)
        return d.mul_(torch.from_numpy(bits < density * 2.0**width)).mul_(factor)

    return keep


@dataclass(frozen=True, eq=False)
class Sparse(Expression):
    """`part` with most numbers dropped, tensor by tensor."""

    part: Expression
    density: float
    method: str = "magnitude"
    options: dict[str, Any] = field(default_factory=dict)
    _keeps: dict[str, Keep] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        fraction(self.density, "density")
        SPARSIFIERS.lookup(self.method)

    @property
    def shapes(self) -> Shapes:  # type: ignore[override]
        return self.part.shapes

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._keeps:
            try:
                self._keeps[name] = SPARSIFIERS[self.method](self.part, name, self.density, **self.options)
            except TypeError as error:
                raise SurgeryError(f"sparsified('{self.method}') does not take these options: {error}.") from None
        return self._keeps[name](self.part.flat(name, start, stop), start)

    def parts(self) -> tuple[Expression, ...]:
        return (self.part,)

    def over(self, change: Callable[[Expression], Expression]) -> Expression:
        return replace(self, part=self.part.over(change), _keeps={})

    def key(self) -> Any:
        return self.part, self.density, self.method, tuple(sorted(self.options.items()))

    def __str__(self) -> str:
        more = "".join(f", {k}={v}" for k, v in self.options.items())
        return f"({self.part}).sparsified({self.density:g}, {self.method}{more})"


@dataclass(frozen=True, eq=False)
class Merged(Expression):
    """Several vectors made into one by a merge method that works on differences: TIES, DARE, Breadcrumbs, ...

    A tensor is merged whole, on a base of zeros, when one of its numbers is first read.
    """

    vectors: tuple[Expression, ...]
    method: str
    parameters: dict[str, Any]
    seed: int
    shapes: Shapes = field(repr=False)
    _last: threading.local = field(default_factory=threading.local, repr=False)

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        if getattr(self._last, "name", None) != name:
            self._last.tensor, self._last.name = self._merge(name).reshape(-1), name
        return self._last.tensor[start:stop].clone()

    def _merge(self, name: str) -> Tensor:
        from surgery.weights.methods import METHODS

        method = METHODS.lookup(self.method)
        shape = self.shapes[name]
        tuned = [v.whole(name) if name in v.shapes else torch.zeros(shape) for v in self.vectors]
        parameters = dict(self.parameters)
        if method.random:
            parameters["keys"] = [derive_key(self.seed, self.method, i, name) for i in range(len(tuned))]
        return method.function(tuned, torch.zeros(shape), **parameters).float()

    def parts(self) -> tuple[Expression, ...]:
        return self.vectors

    def over(self, change: Callable[[Expression], Expression]) -> Expression:
        return replace(self, vectors=tuple(v.over(change) for v in self.vectors), _last=threading.local())

    def key(self) -> Any:
        return self.vectors, self.method, repr(self.parameters), self.seed

    def __str__(self) -> str:
        given = ", ".join([self.method, *(f"{k}={v}" for k, v in self.parameters.items())])
        return f"merged({'; '.join(map(str, self.vectors))}; {given})"
