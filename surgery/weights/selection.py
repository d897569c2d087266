"""The k largest magnitudes of a tensor, exactly, in two streamed passes: a radix selection.

float32 patterns of non-negative numbers are ordered like the numbers, so a magnitude is a key of two 16-bit digits.
Pass one counts the upper digits, pass two the lower digits of the one bucket that holds the wanted rank. That is O(n),
never sorts, needs 1 MB, and gives the threshold with the exact number of elements equal to it, which decides bf16
checkpoints: there equal magnitudes are the normal case (one fifth of the kept set and more).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from surgery.weights.streams import Workspace

DIGIT = 1 << 16
HIGH = DIGIT >> 1
"""Upper digits that occur: the sign bit of a magnitude is 0."""

Walk = Callable[[], Iterable[Sequence[Tensor]]]
"""Starts one walk over a tensor: per chunk a list with the flat float32 differences of every input."""


@dataclass
class Cut:
    """What a rank became: keep |d| > `threshold`, and the first `quota` of the `equal` elements at the threshold.

    `keep` is called with the chunks in order and counts how many of the quota are given out.
    """

    threshold: float
    quota: int
    equal: int
    _seen: int = 0

    def keep(self, d: Tensor, out: Tensor, work: Workspace) -> Tensor:
        """`out = d` where kept, 0 elsewhere; `d` is flat float32."""
        if self.threshold == np.inf:
            return out.zero_()
        if self.quota == self.equal:  # all of them: an inclusive threshold
            below = float(np.nextafter(np.float32(self.threshold), np.float32(-1)))
            return torch.hardshrink(d, below, out=out) if below > 0 else out.copy_(d)
        torch.hardshrink(d, self.threshold, out=out)
        if self.quota > 0 and self.threshold > 0 and self._seen < self.quota:  # zeros are zeros, kept or not
            places = _where_equal(d, self.threshold, work)
            chosen = places[: self.quota - self._seen]
            self._seen += places.numel()
            out[chosen] = d[chosen]
        return out


def cuts(walk: Walk, ranks: Sequence[Sequence[int]], work: Workspace, *, ties: str = "index") -> list[list[Cut]]:
    """For every input the cuts that keep its `ranks` largest magnitudes (several ranks per input are free).

    `ties` says which of the elements equal to the threshold are kept: `"index"` the first, so that exactly k are,
    `"all"` or `"none"`, as in `sparsify`.
    """
    high = [np.zeros(HIGH, np.int64) for _ in ranks]
    for chunk in walk():
        count_high(chunk, high, work)
    lows = [[Low(locate(h, r)) for r in rank] for h, rank in zip(high, ranks, strict=True)]
    for chunk in walk():
        count_low(chunk, lows, work)
    return [[cut(low, ties) for low in each] for each in lows]


Place = tuple[int, int] | None
"""The bucket (upper digit) that holds a rank, and the rank inside that bucket; None when nothing is wanted."""


@dataclass
class Low:
    """The lower digits of the elements in one bucket, counted in large portions: a histogram costs 0.5 MB each time."""

    place: Place
    _counts: np.ndarray = field(default_factory=lambda: np.zeros(DIGIT, np.int64))
    _waiting: list[np.ndarray] = field(default_factory=list)

    def add(self, digits: np.ndarray) -> None:
        """Takes digits (whole numbers below 2^16) in."""
        self._waiting.append(digits)
        if sum(d.size for d in self._waiting) > 1 << 19:
            self.counts  # noqa: B018 - counts what is waiting

    def merge(self, other: Low) -> None:
        """Adds what `other` counted in the same bucket."""
        self._counts += other.counts

    @property
    def counts(self) -> np.ndarray:
        """How often each digit was seen."""
        if self._waiting:
            self._counts += np.bincount(np.concatenate(self._waiting), minlength=DIGIT)
            self._waiting.clear()
        return self._counts


def count_high(chunk: Sequence[Tensor], high: Sequence[np.ndarray], work: Workspace) -> None:
    """Adds the upper digits of every input's magnitudes to its histogram."""
    for d, counts in zip(chunk, high, strict=True):
        digits = np.right_shift(_pattern(d), 16, out=work.host("digits", d.numel()))
        both = torch.bincount(torch.from_numpy(digits.view(np.int32)), minlength=DIGIT).numpy()
        counts += both[:HIGH]
        counts += both[HIGH:]  # the sign is the topmost bit: negative numbers count like positive ones


def count_low(chunk: Sequence[Tensor], lows: Sequence[Sequence[Low]], work: Workspace) -> None:
    """Adds the lower digits of the magnitudes in each wanted bucket to its histogram."""
    for d, each in zip(chunk, lows, strict=True):
        if all(low.place is None for low in each):
            continue
        size = d.numel()
        doubled = np.left_shift(_pattern(d), 1, out=work.host("doubled", size))  # the sign falls off
        digits, inside = work.host("digits", size), work.host("inside", size, np.bool_)
        for low in each:
            if low.place is not None:
                # Wraps round: what is below the bucket becomes large, so that one comparison finds the inside.
                np.subtract(doubled, np.uint32(low.place[0] << 17), out=digits)
                np.less(digits, np.uint32(DIGIT << 1), out=inside)
                low.add(digits[inside] >> 1)


def locate(high: np.ndarray, rank: int) -> Place:
    """Where the `rank`-th largest is, by the upper digits alone."""
    rank = min(rank, int(high.sum()))
    if rank <= 0:
        return None
    above = high[::-1].cumsum()[::-1]
    bucket = int(np.flatnonzero(above >= rank)[-1])
    return bucket, rank - (int(above[bucket + 1]) if bucket + 1 < len(above) else 0)


def cut(low: Low, ties: str) -> Cut:
    """The cut at the rank that `locate` placed, from the lower digits of its bucket."""
    if low.place is None:
        return Cut(np.inf, 0, 0)
    bucket, rank = low.place
    above = low.counts[::-1].cumsum()[::-1]
    digit = int(np.flatnonzero(above >= rank)[-1])
    equal = int(low.counts[digit])
    quota = rank - (int(above[digit + 1]) if digit + 1 < len(above) else 0)
    threshold = float(np.array(bucket << 16 | digit, np.uint32).view(np.float32))
    quota = {"all": equal, "none": 0}.get(ties, quota)
    return Cut(threshold, quota, equal)


def _pattern(d: Tensor) -> np.ndarray:
    """The bits of flat float32 numbers."""
    return d.cpu().numpy().view(np.uint32)


def _where_equal(d: Tensor, threshold: float, work: Workspace) -> Tensor:
    """Indices of the elements of magnitude `threshold`. numpy compares several times faster than torch."""
    doubled = np.left_shift(_pattern(d), 1, out=work.host("doubled", d.numel()))
    wanted = np.float32(threshold).view(np.uint32) << np.uint32(1)
    equal = np.equal(doubled, wanted, out=work.host("inside", d.numel(), np.bool_))
    return torch.from_numpy(np.flatnonzero(equal)).to(d.device)
