"""The k largest magnitudes of a tensor, exactly, in two streamed passes: a radix selection.

float32 patterns of non-negative numbers are ordered like the numbers, so a magnitude is a key of two 16-bit digits.
Pass one counts the upper digits, pass two the lower digits of the one bucket that holds the wanted rank. That is O(n),
never sorts, needs 1 MB, and gives the threshold with the exact number of elements equal to it, which decides bf16
checkpoints: there equal magnitudes are the normal case (one fifth of the kept set and more).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DIGIT = 1 << 16
HIGH = DIGIT >> 1
"""Upper digits that occur: the sign bit of a magnitude is 0."""

Walk = Callable[[], Iterable[list[Tensor]]]
"""Starts one walk over the magnitudes: per chunk a list with one flat float32 tensor (>= 0) per input."""


@dataclass
class Cut:
    """What a rank became: keep |d| > `threshold`, and the first `quota` of the `equal` elements at the threshold.

    `keep` is called with the chunks in order and counts how many equal elements have passed.
    """

    threshold: float
    quota: int
    equal: int
    _seen: int = 0

    def keep(self, d: Tensor, out: Tensor) -> Tensor:
        """`out = d` where kept, 0 elsewhere; `d` is flat float32."""
        if self.threshold == np.inf:
            return out.zero_()
        if self.quota == self.equal:  # all of them: an inclusive threshold
            below = float(np.nextafter(np.float32(self.threshold), np.float32(-1)))
            return torch.hardshrink(d, below, out=out) if below > 0 else out.copy_(d)
        torch.hardshrink(d, self.threshold, out=out)
        if self.quota > 0 and self.threshold > 0 and self._seen < self.equal:  # zeros are zeros, kept or not
            places = _where_equal(d, self.threshold)
            chosen = places[: max(0, self.quota - self._seen)]
            self._seen += places.numel()
            out[chosen] = d[chosen]
        return out


def cuts(walk: Walk, ranks: Sequence[Sequence[int]], *, ties: str = "index") -> list[list[Cut]]:
    """For every input the cuts that keep its `ranks` largest magnitudes (several ranks per input are free).

    `ties` says which of the elements equal to the threshold are kept: `"index"` the first, so that exactly k are,
    `"all"` or `"none"`, as in `sparsify`.
    """
    high = [np.zeros(HIGH, np.int64) for _ in ranks]
    for chunk in walk():
        count_high(chunk, high)
    wanted = [[locate(h, r) for r in rank] for h, rank in zip(high, ranks, strict=True)]
    low = [[np.zeros(DIGIT, np.int64) for _ in w] for w in wanted]
    for chunk in walk():
        count_low(chunk, wanted, low)
    return [
        [cut(place, counts, ties) for place, counts in zip(w, l, strict=True)] for w, l in zip(wanted, low, strict=True)
    ]


Place = tuple[int, int] | None
"""The bucket (upper digit) that holds a rank, and the rank inside that bucket; None when nothing is wanted."""


def count_high(chunk: Sequence[Tensor], high: Sequence[np.ndarray]) -> None:
    """Adds the upper digits of every input's magnitudes to its histogram."""
    for magnitude, counts in zip(chunk, high, strict=True):
        digits = magnitude.view(torch.int32) >> 16
        counts += torch.bincount(digits, minlength=HIGH).cpu().numpy()


def count_low(chunk: Sequence[Tensor], places: Sequence[Sequence[Place]], low: Sequence[Sequence[np.ndarray]]) -> None:
    """Adds the lower digits of the magnitudes in each wanted bucket to its histogram."""
    for magnitude, wanted, histograms in zip(chunk, places, low, strict=True):
        keys = magnitude.cpu().numpy().view(np.uint32)
        for place, counts in zip(wanted, histograms, strict=True):
            if place is not None:
                digit = keys - np.uint32(place[0] << 16)  # wraps round: what is outside the bucket becomes large
                counts += np.bincount(digit[digit < DIGIT], minlength=DIGIT)


def locate(high: np.ndarray, rank: int) -> Place:
    """Where the `rank`-th largest is, by the upper digits alone."""
    rank = min(rank, int(high.sum()))
    if rank <= 0:
        return None
    above = high[::-1].cumsum()[::-1]
    bucket = int(np.flatnonzero(above >= rank)[-1])
    return bucket, rank - (int(above[bucket + 1]) if bucket + 1 < len(above) else 0)


def cut(place: Place, low: np.ndarray, ties: str) -> Cut:
    """The cut at the rank that `locate` placed, from the lower digits of its bucket."""
    if place is None:
        return Cut(np.inf, 0, 0)
    bucket, rank = place
    above = low[::-1].cumsum()[::-1]
    digit = int(np.flatnonzero(above >= rank)[-1])
    equal = int(low[digit])
    quota = rank - (int(above[digit + 1]) if digit + 1 < len(above) else 0)
    threshold = float(np.array(bucket << 16 | digit, np.uint32).view(np.float32))
    quota = {"all": equal, "none": 0}.get(ties, quota)
    return Cut(threshold, quota, equal)


def _where_equal(d: Tensor, threshold: float) -> Tensor:
    """Indices of the elements of magnitude `threshold`."""
    if d.device.type != "cpu":
        return (d.abs() == threshold).nonzero().view(-1)
    keys = d.numpy().view(np.uint32) & np.uint32(0x7FFFFFFF)  # several times faster than torch's comparison
    return torch.from_numpy(np.flatnonzero(keys == np.float32(threshold).view(np.uint32)))


def magnitudes(deltas: Iterator[list[Tensor]], scratch: Callable[[int, int], Tensor]) -> Iterator[list[Tensor]]:
    """The absolute values of every input's chunk, in scratch memory (input number, size)."""
    for chunk in deltas:
        yield [torch.abs(d, out=scratch(i, d.numel())) for i, d in enumerate(chunk)]
