"""How many numbers may move, and where they compete: a `Budget`, and the exact choice of the highest scores."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.tuning.selection.places import Places, narrow

Scope = Literal["tensor", "row", "global"]


@dataclass(frozen=True)
class Budget:
    """One of `density` (share of the numbers), `count` (of all of them), or `lora_rank`: as many numbers as a LoRA of
    that rank has, r (m + n) of each m x n matrix (LIFT, arXiv:2506.00772).

    `scope` says who competes: the numbers of each tensor (LIFT), of each row, or of all tensors (LT-SFT). A row is
    what feeds one output of a projection.
    """

    density: float | None = None
    count: int | None = None
    lora_rank: int | None = None
    scope: Scope = "tensor"

    def __post_init__(self) -> None:
        given = [n for n in ("density", "count", "lora_rank") if getattr(self, n) is not None]
        if len(given) > 1:
            raise SurgeryError(f"One budget is needed, and {' and '.join(given)} are given.", hint="Keep one of them.")
        if self.scope not in ("tensor", "row", "global"):
            raise SurgeryError(f"There is no scope '{self.scope}'.", hint="tensor, row or global.")
        if self.density is not None and not 0 < self.density <= 1:
            raise SurgeryError(f"A density of {self.density:g} selects nothing or more than all.",
                               hint="It is a share: above 0, at most 1.")  # fmt: skip
        for name in ("count", "lora_rank"):
            value = getattr(self, name)
            if value is not None and (value < 1 or value != int(value)):
                raise SurgeryError(
                    f"A budget of {name} {value:g} can't be met.", hint="It is a whole number, 1 or more."
                )

    @property
    def given(self) -> bool:
        """Whether it says anything."""
        return any(v is not None for v in (self.density, self.count, self.lora_rank))

    def shares(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """How many numbers of each tensor; they add up to the budget. Raises `SurgeryError` for more than all."""
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        if self.lora_rank is not None:
            return {name: _lora(shape, self.lora_rank) for name, shape in shapes.items()}
        total, count = sum(sizes.values()), self.count
        if self.density is not None:
            found = {name: math.floor(self.density * size + 0.5) for name, size in sizes.items()}
            count = math.floor(self.density * total + 0.5)
            if not (count if self.scope == "global" else any(found.values())):
                raise SurgeryError(f"A density of {self.density:g} selects nothing of {total:,} numbers.",
                                   hint="Raise it.")  # fmt: skip
            return _divided(count, sizes) if self.scope == "global" else found
        if count is None:
            raise SurgeryError("No budget is given.", hint="density=0.05, count=10000 or lora_rank=8.")
        if count > total:
            raise SurgeryError(f"A budget of {count:,} numbers is more than the {total:,} that there are.")
        return _divided(int(count), sizes)


def _divided(count: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """`count` by size, the largest remainders rounded up; of equal ones the first."""
    total = sum(sizes.values())
    found = {name: count * size // total for name, size in sizes.items()}
    by_rest = sorted(found, key=lambda name: -(count * sizes[name] % total))
    for name in by_rest[: count - sum(found.values())]:
        found[name] += 1
    return found


def _lora(shape: tuple[int, ...], rank: int) -> int:
    m, n = shape[-2], shape[-1]
    return math.prod(shape[:-2]) * min((m + n) * rank, m * n)


def choose(
    scores: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    budget: Budget,
    transposed: Collection[str] = (),
) -> dict[str, Places]:
    """The places with the highest scores within the budget; `scores` come one tensor at a time, in any order.

    Exactly as many as the budget says; of equal scores the first positions win (in `shapes`' order of tensors).
    `transposed` are tensors that are kept (in, out): their rows are the stored columns. Raises `SurgeryError` for
    scores that are NaN.
    """
    shares = budget.shares(shapes)
    if budget.scope == "global":
        return _together(scores, shapes, sum(shares.values()))
    found: dict[str, Places] = {}
    for name, values in scores:
        _check(name, values)
        if budget.scope == "row":
            places = (
                _by_row(values.mT, shares[name], back=True) if name in transposed else _by_row(values, shares[name])
            )
        else:
            places = top_places(values, shares[name])
        found[name] = narrow(places, values.numel())
    return {name: found[name] for name in shapes if len(found[name])}  # type: ignore[arg-type]


def top_places(scores: Tensor, k: int) -> Tensor:
    """Flat positions (int64, ascending) of the k highest scores; of equal ones the first."""
    flat = scores.reshape(-1)
    n = flat.numel()
    if k >= n or k <= 0:
        return torch.arange(n if k > 0 else 0, device=flat.device)
    threshold = flat.kthvalue(n - k + 1).values  # a selection, not a sort
    above = flat > threshold
    missing = k - int(above.sum())
    above[(flat == threshold).nonzero().view(-1)[:missing]] = True
    return above.nonzero().view(-1)


def _by_row(scores: Tensor, k: int, *, back: bool = False) -> Tensor:
    """k places shared out evenly over the rows (the first ones get what is left over); `back`: places of scores.mT."""
    rows = scores.reshape(-1, scores.shape[-1])
    each, more = divmod(k, len(rows))
    order = rows.argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros_like(rows, dtype=torch.bool)
    kept.scatter_(1, order[:, :each], True)
    if more:
        kept[:more].scatter_(1, order[:more, each : each + 1], True)
    kept = kept.view(scores.shape)
    return (kept.mT if back else kept).reshape(-1).nonzero().view(-1)


def _together(scores: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]], k: int) -> dict[str, Places]:
    """The k highest of all tensors, with no more than about 3 k candidates in memory at a time."""
    order = {name: i for i, name in enumerate(shapes)}
    kept: list[tuple[Tensor, Tensor, Tensor]] = []  # scores, number of the tensor, position
    held, floor = 0, None
    for name, values in scores:
        _check(name, values)
        flat = values.reshape(-1).float()
        places = None if floor is None else (flat >= floor).nonzero().view(-1)
        if places is None or len(places) > k:
            places = top_places(flat, k)
        kept.append((flat[places], torch.full_like(places, order[name]), places))
        held += len(places)
        if held > 2 * k:
            kept = [_best(kept, k)]
            held, floor = len(kept[0][0]), kept[0][0].min()
    values, tensor, place = _best(kept, k)
    found: dict[str, Places] = {}
    for name, number in order.items():
        mine = place[tensor == number]
        if len(mine):
            found[name] = narrow(mine, math.prod(shapes[name]))
    return found


def _best(kept: list[tuple[Tensor, Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor, Tensor]:
    values, tensor, place = (torch.cat([part[i].cpu() for part in kept]) for i in range(3))
    order = place.argsort(stable=True)
    order = order[tensor[order].argsort(stable=True)]  # by tensor, then by position: so ties fall the same way
    values, tensor, place = values[order], tensor[order], place[order]
    best = top_places(values, k)
    return values[best], tensor[best], place[best]


def _check(name: str, scores: Tensor) -> None:
    if bool(scores.isnan().any()):
        raise SurgeryError(
            f"Scores of '{name}' are NaN.", hint="Its weights, or the gradients of its data, are broken."
        )
