"""The lazy algebra under `TaskVector`: small immutable expressions, computed piece by piece when somebody reads.

| expression  | what it stands for                                                              |
|-------------|---------------------------------------------------------------------------------|
| Difference  | tuned - base, two sources                                                       |
| Combination | a weighted sum of expressions; equal terms meet, so that (a + b) - b is a       |
| Weighted    | one expression with a factor for every tensor                                   |
| Restricted  | one expression, some tensors only                                               |

Further ones live where their subject is: `Stored` in formats.py, `LowRank` in low_rank.py, `Adapter` in adapters.py,
`Sparse` in sparse.py, `Scattered` in deltas/file.py.
The currency is the flat range: numbers `start:stop` of a tensor laid out in a row, as float32. It is independent of
shapes, so that giant rows (fused experts) stay bounded in memory, and the answer does not depend on the chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from surgery.checkpoint import Source
from surgery.errors import SurgeryError
from surgery.weights.sources import Anchor, flat

Shapes = Mapping[str, tuple[int, ...]]


class Expression:
    """What a task vector is made of. `shapes` says for which tensors; every other tensor has difference zero."""

    shapes: Shapes

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        """Numbers `start:stop` of the difference, float32, in memory of its own."""
        raise NotImplementedError

    def exact(self, name: str) -> str | None:
        """The storage type of the tuned model's tensor when its very bits are known (see `restored`), else None."""
        return None

    def restored(self, name: str, start: int, stop: int, base: Tensor) -> Tensor:
        """The tuned model's own bits of a range, given the base's stored numbers of the same range."""
        raise NotImplementedError

    @property
    def sound(self) -> bool:
        """Whether what `restored` gives is known to be finite."""
        return False

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """(left, right) of shapes m x R and R x n, float32, when the tensor is known to be their product."""
        return None

    def anchors(self) -> tuple[Anchor, ...]:
        """The bases that the differences were taken from, each once; empty when none is known."""
        return tuple(dict.fromkeys(anchor for part in self.parts() for anchor in part.anchors()))

    def parts(self) -> tuple[Expression, ...]:
        return ()

    def over(self, change: Callable[[Expression], Expression]) -> Expression:
        """The same expression with `change` applied to its leaves."""
        return change(self)

    def bound(self, base: Source, *, trusted: bool = False) -> Expression:
        """The same with `base` at hand, where it is stored; `trusted`: somebody else compares its numbers."""
        return self

    def key(self) -> Any:
        """What makes two expressions of one class equal."""
        return id(self)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.key() == other.key()

    def __hash__(self) -> int:
        return hash((type(self), self.key()))

    def refuse(self, name: str, numbers: Tensor) -> None:
        """Raises `SurgeryError` if some of `numbers` are not finite."""
        bad = int((~torch.isfinite(numbers)).sum())
        if bad:
            raise SurgeryError(
                f"{self}: tensor '{name}' has values that are NaN or infinite ({bad:,} in the part that was read).",
                hint="Repair that checkpoint first.",
            )

    def whole(self, name: str) -> Tensor:
        """The difference of one tensor, float32, in its shape."""
        shape = self.shapes[name]
        return self.flat(name, 0, math.prod(shape)).view(shape)


@dataclass(frozen=True, eq=False)
class Difference(Expression):
    """tuned - base: in float32 (float64 when one of them is), rounded to float32."""

    base: Source
    tuned: Source
    names: tuple[str, str]
    shapes: Shapes = field(repr=False)
    anchor: Anchor = field(repr=False)

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        base, tuned = flat(self.base, name, start, stop), flat(self.tuned, name, start, stop)
        if torch.float64 in (base.dtype, tuned.dtype):
            numbers = (tuned.double() - base.double()).float()
        else:
            numbers = tuned.to(torch.float32, copy=True).sub_(base.float())
        if not bool(torch.isfinite(numbers.sum())):  # a sum is cheap, and tells
            self.refuse(name, numbers)
        return numbers

    def exact(self, name: str) -> str | None:
        return self.tuned.tensors[name].dtype

    def restored(self, name: str, start: int, stop: int, base: Tensor) -> Tensor:
        return flat(self.tuned, name, start, stop)

    def anchors(self) -> tuple[Anchor, ...]:
        return (self.anchor,)

    def key(self) -> Any:
        return self.base.path, self.tuned.path

    def __str__(self) -> str:
        return f"{self.names[1]} - {self.names[0]}"


@dataclass(frozen=True, eq=False)
class Combination(Expression):
    """The sum of `factor * part` over `terms`, added up in that order."""

    terms: tuple[tuple[float, Expression], ...]
    shapes: Shapes = field(repr=False)

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        total: Tensor | None = None
        for factor, part in self.terms:
            if name not in part.shapes:
                continue
            numbers = part.flat(name, start, stop)
            if total is None:
                total = numbers if factor == 1 else numbers.mul_(factor)
            else:
                total.add_(numbers, alpha=factor)
        assert total is not None
        return total

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        pairs = [(factor, part.factors(name)) for factor, part in self.terms if name in part.shapes]
        known = [(factor * pair[0], pair[1]) for factor, pair in pairs if pair is not None]
        if len(known) < len(pairs):
            return None
        return torch.cat([left for left, _ in known], 1), torch.cat([right for _, right in known])

    def parts(self) -> tuple[Expression, ...]:
        return tuple(part for _, part in self.terms)

    def over(self, change: Callable[[Expression], Expression]) -> Expression:
        return replace(self, terms=tuple((factor, part.over(change)) for factor, part in self.terms))

    def key(self) -> Any:
        return self.terms

    def __str__(self) -> str:
        text = ""
        for factor, part in self.terms:
            inner = str(part)
            size = abs(factor)
            if not isinstance(part, Combination) and " " not in inner and size == 1:
                term = inner
            else:
                term = (f"{size:g}*" if size != 1 else "") + f"({inner})"
            text += (" - " if factor < 0 else " + ") + term
        return text[3:] if text.startswith(" + ") else "-" + text[3:]


def combine(*terms: tuple[float, Expression]) -> Expression:
    """`factor * expression` summed: nested sums are flattened and equal terms meet.

    Raises `SurgeryError` when the terms have other bases, other shapes, or (without known bases) other names.
    """
    flattened: dict[Expression, float] = {}
    for factor, part in terms:
        inner = part.terms if isinstance(part, Combination) else ((1.0, part),)
        for own, expression in inner:
            flattened[expression] = flattened.get(expression, 0.0) + factor * own
    shapes = shapes_of(terms)
    kept = {part: factor for part, factor in flattened.items() if factor != 0}
    for part, factor in flattened.items():  # tensors that only vanished terms had stay known, as zeros
        if factor == 0 and not part.shapes.keys() <= {name for other in kept for name in other.shapes}:
            kept[part] = 0.0
    if len(kept) == 1 and next(iter(kept.values())) == 1:
        return next(iter(kept))
    return Combination(tuple((factor, part) for part, factor in kept.items()), shapes)


def shapes_of(terms: Sequence[tuple[float, Expression]]) -> dict[str, tuple[int, ...]]:
    """All tensors of a sum. Raises `SurgeryError` for terms that can't be added, see `combine`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for _, part in terms:
        _check_same(terms[0][1], part)
        shapes |= part.shapes
    return shapes


def _check_same(first: Expression, other: Expression) -> None:
    for name in first.shapes.keys() & other.shapes.keys():
        if first.shapes[name] != other.shapes[name]:
            raise SurgeryError(
                f"Tensor '{name}' is {list(first.shapes[name])} in {first} and {list(other.shapes[name])} in {other}.",
                hint="Only vectors of one architecture and vocabulary can be added.",
            )
    anchors = first.anchors(), other.anchors()
    if all(anchors):
        for a in anchors[0]:
            for b in anchors[1]:
                if a.differs(b):
                    raise SurgeryError(
                        f"{first} and {other} are differences from two different bases ({a.name} and {b.name}).",
                        hint="Take both from one base; if you mean it, in Python: a.unbound() + b.unbound().",
                    )
    elif first.shapes.keys() != other.shapes.keys():
        odd = sorted(first.shapes.keys() ^ other.shapes.keys())
        raise SurgeryError(
            f"{len(odd)} tensors are in only one of {first} and {other}, the first is '{odd[0]}'.",
            hint="Vectors whose base is not known can be added only when they have the same tensors.",
        )


@dataclass(frozen=True, eq=False)
class Weighted(Expression):
    """`part` with tensor `name` multiplied by `weights[name]`."""

    part: Expression
    weights: Mapping[str, float] = field(repr=False)
    note: str = "factors"

    @property
    def shapes(self) -> Shapes:  # type: ignore[override]
        return self.part.shapes

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        return self.part.flat(name, start, stop).mul_(self.weights[name])

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        known = self.part.factors(name)
        return None if known is None else (self.weights[name] * known[0], known[1])

    def parts(self) -> tuple[Expression, ...]:
        return (self.part,)

    def over(self, change: Callable[[Expression], Expression]) -> Expression:
        return replace(self, part=self.part.over(change))

    def key(self) -> Any:
        return self.part, tuple(self.weights.items())

    def __str__(self) -> str:
        return f"({self.part}).scaled({self.note})"


@dataclass(frozen=True, eq=False)
class Restricted(Expression):
    """`part`, but zero (absent) outside `shapes`."""

    part: Expression
    shapes: Shapes = field(repr=False)
    note: str

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        return self.part.flat(name, start, stop)

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        return self.part.factors(name)

    @property
    def sound(self) -> bool:
        return self.part.sound

    def exact(self, name: str) -> str | None:
        return self.part.exact(name)

    def restored(self, name: str, start: int, stop: int, base: Tensor) -> Tensor:
        return self.part.restored(name, start, stop, base)

    def parts(self) -> tuple[Expression, ...]:
        return (self.part,)

    def over(self, change: Callable[[Expression], Expression]) -> Expression:
        return replace(self, part=self.part.over(change))

    def key(self) -> Any:
        return self.part, tuple(self.shapes)

    def __str__(self) -> str:
        return f"({self.part}).{self.note}"


@dataclass(frozen=True, eq=False)
class Unbound(Expression):
    """`part`, with its bases forgotten: it can be added to anything of the same tensors."""

    part: Expression

    @property
    def shapes(self) -> Shapes:  # type: ignore[override]
        return self.part.shapes

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        return self.part.flat(name, start, stop)

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        return self.part.factors(name)

    def anchors(self) -> tuple[Anchor, ...]:
        return ()

    def parts(self) -> tuple[Expression, ...]:
        return (self.part,)

    def over(self, change: Callable[[Expression], Expression]) -> Expression:
        return replace(self, part=self.part.over(change))

    def key(self) -> Any:
        return self.part

    def __str__(self) -> str:
        return str(self.part)
