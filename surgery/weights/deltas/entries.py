"""One tensor of a sparse delta: sorted flat positions and the numbers there, or all its numbers (stored whole)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.checkpoint.header import ITEM_BYTES, dtype_code
from surgery.errors import SurgeryError
from surgery.weights.sources import ranges

LONG = 1 << 31
"""From this many numbers on, positions are int64."""
MOST = 1 << 48
"""No tensor has as many numbers as this: a file that says so is wrong."""


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def storage_bits(numbers: Tensor) -> Tensor:
    """The bits of flat numbers as integers of the same width, sharing memory: NaN equals the same NaN, 0 is not -0."""
    return numbers.view(_BITS[numbers.element_size()])


def place_type(numel: int) -> torch.dtype:
    """The integer type of positions in a tensor of `numel` numbers."""
    return torch.int32 if numel < LONG else torch.int64


@dataclass(frozen=True, eq=False)
class Entry:
    """`places`: flat row-major positions, ascending (int32 or int64), or None for all; `values`: as many, flat."""

    shape: tuple[int, ...]
    places: Tensor | None
    values: Tensor

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def count(self) -> int:
        """How many numbers it moves."""
        return self.values.numel()

    @property
    def code(self) -> str:
        """The storage type of the values: "F32", "BF16", ..."""
        return dtype_code(str(self.values.dtype))

    def put(self, numbers: Tensor, start: int) -> Tensor:
        """Writes the values into `numbers`, which are those from flat position `start` on; the same tensor back."""
        if self.places is None:
            return numbers.copy_(self.values[start : start + numbers.numel()])
        low, high = self._span(start, start + numbers.numel())
        if low < high:
            numbers[self.places[low:high].long().sub_(start)] = self.values[low:high].to(numbers.dtype)
        return numbers

    def of(self, flat: Tensor) -> Tensor:
        """The numbers of a whole flat tensor at the positions, in memory of their own."""
        return flat.clone() if self.places is None else flat[self.places.long()]

    def pieces(self) -> Iterator[tuple[int, Tensor | None, Tensor]]:
        """(number of the first, positions or None, values): slices of bounded length."""
        for a, b in ranges(self.count):
            yield a, None if self.places is None else self.places[a:b], self.values[a:b]

    def with_values(self, values: Tensor) -> Entry:
        return Entry(self.shape, self.places, values)

    def _span(self, start: int, stop: int) -> tuple[int, int]:
        assert self.places is not None
        edges = torch.tensor([start, stop], dtype=self.places.dtype)
        low, high = torch.searchsorted(self.places, edges).tolist()
        return low, high

    def check(self, where: str, name: str) -> None:
        """Raises `SurgeryError` unless positions ascend inside the shape and all values are finite: one walk."""
        last = -1
        for _, places, values in self.pieces():
            if not bool(torch.isfinite(values).all()):
                raise SurgeryError(f"{where}: tensor '{name}' has values that are NaN or infinite.")
            if places is None:
                continue
            if int(places.min()) < 0:
                raise SurgeryError(f"{where}: tensor '{name}' has a negative position, {int(places.min())}.")
            if int(places[0]) <= last or not bool((places[1:] > places[:-1]).all()):
                raise SurgeryError(f"{where}: the positions in tensor '{name}' do not ascend, or one is there twice.")
            last = int(places[-1])
            if last >= self.numel:
                shape = list(self.shape)
                raise SurgeryError(f"{where}: tensor '{name}' of shape {shape} has no position {last:,}.")


def smaller_whole(count: int, numel: int, code: str) -> bool:
    """Whether `count` of `numel` numbers take less room as the whole tensor: a third in 16 bits, half in 32."""
    item = ITEM_BYTES[code]
    return count * (item + place_type(numel).itemsize) >= numel * item > 0


def joined(shape: tuple[int, ...], places: Iterable[Tensor], values: Iterable[Tensor], dtype: torch.dtype) -> Entry:
    """An entry from slices in ascending order; positions of any integer type."""
    kind = place_type(math.prod(shape))
    found = [p.to(kind) for p in places]
    numbers = [v.to(dtype) for v in values]
    if not found:
        return Entry(shape, torch.empty(0, dtype=kind), torch.empty(0, dtype=dtype))
    return Entry(shape, torch.cat(found), torch.cat(numbers))


def members(places: Tensor, among: Tensor) -> Tensor:
    """Which of the ascending `places` are in the ascending `among`: a mask. Both are positions of one tensor."""
    if not among.numel():
        return torch.zeros(places.numel(), dtype=torch.bool)
    kind = torch.int64 if torch.int64 in (places.dtype, among.dtype) else torch.int32
    places, among = places.to(kind), among.to(kind)
    at = torch.searchsorted(among, places).clamp_(max=among.numel() - 1)
    return among[at] == places
