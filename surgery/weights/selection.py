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


def cuts(
    walk: Walk,
    ranks: Sequence[Sequence[int]],
    work: Workspace,
    *,
    ties: str = "index",
    sample: Sequence[Tensor] | None = None,
    numel: int = 0,
) -> list[list[Cut]]:
    """For every input the cuts that keep its `ranks` largest magnitudes (several ranks per input are free).

    `ties` says which of the elements equal to the threshold are kept: `"index"` the first, so that exactly k are,
    `"all"` or `"none"`, as in `sparsify`. With a `sample` of each input (which has `numel` elements in all) the first
    pass is saved: the sample foretells the bucket, and when it was wrong, which the counts tell, both passes are made.
    """
    if sample is not None:
        foretold = [np.zeros(HIGH, np.int64) for _ in ranks]
        count_high(sample, foretold, work)
        places = [[_around(h, rank / numel, rank) for rank in each] for h, each in zip(foretold, ranks, strict=True)]
        lows = [[Low(place, count_above=True) for place in each] for each in places]
        for chunk in walk():
            count_low(chunk, lows, work)
        if all(low.holds for each in lows for low in each):
            return [[cut(low, ties) for low in each] for each in lows]
    high = [np.zeros(HIGH, np.int64) for _ in ranks]
    for chunk in walk():
        count_high(chunk, high, work)
    lows = [[Low(locate(h, r)) for r in rank] for h, rank in zip(high, ranks, strict=True)]
    for chunk in walk():
        count_low(chunk, lows, work)
    return [[cut(low, ties) for low in each] for each in lows]


@dataclass
class Place:
    """Where a rank is sought: among `buckets` upper digits from `first` on, as the `rank`-th largest of those."""

    first: int
    rank: int
    buckets: int = 1


def locate(high: np.ndarray, rank: int) -> Place | None:
    """The bucket of the `rank`-th largest, and its rank in there; None when nothing is wanted."""
    rank = min(rank, int(high.sum()))
    if rank <= 0:
        return None
    above = high[::-1].cumsum()[::-1]
    bucket = int(np.flatnonzero(above >= rank)[-1])
    return Place(bucket, rank - (int(above[bucket + 1]) if bucket + 1 < len(above) else 0))


def _around(sample: np.ndarray, share: float, rank: int) -> Place | None:
    """The bucket that the sample's histogram foretells, with its neighbours; `rank` is still that in the whole."""
    found = locate(sample, max(1, round(share * int(sample.sum())))) if rank > 0 else None
    if found is None:
        return None
    first = max(0, found.first - 1)
    return Place(first, rank, min(HIGH, found.first + 2) - first)


@dataclass
class Low:
    """The lower digits of the elements at a place, counted in large portions: a histogram costs 0.5 MB each time."""

    place: Place | None
    count_above: bool = False
    """Also counts what lies above the place, whose rank is then that in the whole tensor."""
    above: int = 0
    _counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    _waiting: list[np.ndarray] = field(default_factory=list)

    def add(self, doubled: np.ndarray, work: Workspace) -> None:
        """Takes a chunk in: the patterns of its numbers, shifted left by one so that the sign is gone."""
        if self.place is None:
            return
        digits, inside = work.host("digits", len(doubled)), work.host("inside", len(doubled), np.bool_)
        width = self.place.buckets * DIGIT * 2
        # Wraps round: what is below the place becomes large, so that one comparison finds the inside.
        np.subtract(doubled, np.uint32(self.place.first * DIGIT * 2), out=digits)
        np.less(digits, np.uint32(width), out=inside)
        self._waiting.append(digits[inside] >> 1)
        if self.count_above and (end := self.place.first * DIGIT * 2 + width) < 2**32:
            self.above += int(np.count_nonzero(np.greater_equal(doubled, np.uint32(end), out=inside)))
        if sum(d.size for d in self._waiting) > 1 << 19:
            self.counts  # noqa: B018 - counts what is waiting

    def merge(self, other: Low) -> None:
        """Adds what `other` counted at the same place."""
        self._counts = self.counts + other.counts
        self.above += other.above

    @property
    def counts(self) -> np.ndarray:
        """How often each digit was seen, from the place's first number on."""
        size = DIGIT * (self.place.buckets if self.place else 1)
        if not len(self._counts):
            self._counts = np.zeros(size, np.int64)
        if self._waiting:
            self._counts += np.bincount(np.concatenate(self._waiting), minlength=size)
            self._waiting.clear()
        return self._counts

    @property
    def holds(self) -> bool:
        """Whether the rank lies inside the place."""
        return self.place is None or self.above < self.place.rank <= self.above + int(self.counts.sum())


def count_high(chunk: Sequence[Tensor], high: Sequence[np.ndarray], work: Workspace) -> None:
    """Adds the upper digits of every input's magnitudes to its histogram."""
    for d, counts in zip(chunk, high, strict=True):
        digits = np.right_shift(_pattern(d), 16, out=work.host("digits", d.numel()))
        both = torch.bincount(torch.from_numpy(digits.view(np.int32)), minlength=DIGIT).numpy()
        counts += both[:HIGH]
        counts += both[HIGH:]  # the sign is the topmost bit: negative numbers count like positive ones


def count_low(chunk: Sequence[Tensor], lows: Sequence[Sequence[Low]], work: Workspace) -> None:
    """Adds the lower digits of the magnitudes at each wanted place to its histogram."""
    for d, each in zip(chunk, lows, strict=True):
        if any(low.place is not None for low in each):
            doubled = np.left_shift(_pattern(d), 1, out=work.host("doubled", d.numel()))
            for low in each:
                low.add(doubled, work)


def cut(low: Low, ties: str) -> Cut:
    """The cut at the rank that was sought, from the digits counted around it."""
    if low.place is None:
        return Cut(np.inf, 0, 0)
    rank = low.place.rank - low.above
    at_least = low.counts[::-1].cumsum()[::-1]
    digit = int(np.flatnonzero(at_least >= rank)[-1])
    equal = int(low.counts[digit])
    quota = rank - (int(at_least[digit + 1]) if digit + 1 < len(at_least) else 0)
    threshold = float(np.array(low.place.first * DIGIT + digit, np.uint32).view(np.float32))
    return Cut(threshold, {"all": equal, "none": 0}.get(ties, quota), equal)


def _pattern(d: Tensor) -> np.ndarray:
    """The bits of flat float32 numbers."""
    return d.cpu().numpy().view(np.uint32)


def _where_equal(d: Tensor, threshold: float, work: Workspace) -> Tensor:
    """Indices of the elements of magnitude `threshold`. numpy compares several times faster than torch."""
    doubled = np.left_shift(_pattern(d), 1, out=work.host("doubled", d.numel()))
    wanted = np.float32(threshold).view(np.uint32) << np.uint32(1)
    equal = np.equal(doubled, wanted, out=work.host("inside", d.numel(), np.bool_))
    return torch.from_numpy(np.flatnonzero(equal)).to(d.device)
