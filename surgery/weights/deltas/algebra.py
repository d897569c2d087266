"""Several sparse deltas together: added up without a dense tensor, and measured for how far they meet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.weights.deltas.entries import Entry, joined, members
from surgery.weights.deltas.file import SparseDelta
from surgery.weights.sources import Anchor, ranges


def compose(deltas: Sequence[SparseDelta], base: Any = None, *, scales: Sequence[float] | None = None) -> SparseDelta:
    """The sum of `scales[i] * deltas[i]` (all 1) in mode "add": the union of positions, their values added up.

    What memory it takes is that of the entries. Values that meet are sorted, added in float64 and rounded once to
    float32, so the order of the deltas does not matter, to the bit. Deltas of mode "set" need their `base`. Where
    bases are known, they must be one; the result's is known only when all are. LT-SFT, arXiv:2110.07560, section 3.
    Raises `SurgeryError` for other shapes or another base, and for sums beyond float32.
    """
    deltas, scales = list(deltas), [1.0] * len(deltas) if scales is None else list(scales)
    if not deltas or len(scales) != len(deltas) or not all(math.isfinite(s) for s in scales):
        raise SurgeryError(f"{len(deltas)} deltas and {len(scales)} finite scales were given; one scale for each.")
    _one_base(deltas)
    parts = [delta.added(base) for delta in deltas]
    entries: dict[str, Entry] = {}
    for name in dict.fromkeys(name for part in parts for name in part.entries):
        terms = [(scale, p.entries[name]) for scale, p in zip(scales, parts, strict=True) if name in p.entries]
        entries[name] = _sum(terms)
        if not bool(torch.isfinite(entries[name].values).all()):
            raise SurgeryError(f"The sum of the deltas goes beyond float32 in tensor '{name}'.")
    known = all(part.base is not None for part in parts)
    sums = {name: s for part in parts for name, s in part.checksums.items()} if known else {}
    text = " + ".join(_term(scale, part) for scale, part in zip(scales, parts, strict=True))
    types = {name: kind for part in parts for name, kind in part.types.items()}
    noted = {"of": [part.definition for part in parts], "scales": scales}
    total, first = max(part.total for part in parts), parts[0]
    return SparseDelta(entries, "add", first.base if known else None, sums, total, text, types, "composed", noted,
                       source=first.source if known else None)  # fmt: skip


def _term(scale: float, part: SparseDelta) -> str:
    inner = f"({part.definition})" if " " in part.definition else part.definition
    return inner if scale == 1 else f"{scale:g}*{inner}"


def _one_base(deltas: Sequence[SparseDelta]) -> None:
    known = [(d, Anchor(str(d.base.get("name")), str(d.base.get("header")), d.checksums)) for d in deltas if d.base]
    shapes: dict[str, tuple[int, ...]] = {}
    for delta in deltas:
        for name, shape in delta.shapes.items():
            if shapes.setdefault(name, shape) != shape:
                raise SurgeryError(
                    f"Tensor '{name}' is {list(shapes[name])} in one delta and {list(shape)} in {delta.definition}.",
                    hint="Only deltas of one architecture and vocabulary can be put together.",
                )
    for delta, anchor in known[1:]:
        for first, other in known:
            if first is not delta and anchor.differs(other):
                raise SurgeryError(f"{first.definition} and {delta.definition} are of two different bases.",
                                   hint="Take both from one base.")  # fmt: skip


def _sum(terms: Sequence[tuple[float, Entry]]) -> Entry:
    shape = terms[0][1].shape
    if any(entry.places is None for _, entry in terms):
        values = torch.empty(math.prod(shape))
        for start, stop in ranges(values.numel()):
            rows = [e.put(torch.zeros(stop - start, dtype=torch.float64), start).mul_(s) for s, e in terms]
            values[start:stop] = torch.stack(rows).sort(0).values.sum(0)
        return Entry(shape, None, values)
    places = torch.cat([entry.places.long() for _, entry in terms if entry.places is not None])
    values = torch.cat([entry.values.double() * scale for scale, entry in terms])
    values, order = values.sort()
    places, at = places[order].sort(stable=True)
    union, which = torch.unique_consecutive(places, return_inverse=True)
    total = torch.zeros(union.numel(), dtype=torch.float64).index_add_(0, which, values[at])
    return joined(shape, [union], [total], torch.float32)


# ---- where deltas meet ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meeting:
    """Two deltas in one tensor (or in all): how many numbers each moves, how many both, and how many with one sign.

    `signed` counts the common numbers that both change by something other than zero; None where a sign is not known.
    `expected` is how many would be common if positions were drawn evenly within every tensor.
    """

    counts: tuple[int, int] = (0, 0)
    common: int = 0
    expected: float = 0.0
    signed: int | None = 0
    agreeing: int = 0

    @property
    def overlap(self) -> float:
        """|I1 n I2| / min(K1, K2); NaN when one moves nothing."""
        return self.common / smaller if (smaller := min(self.counts)) else math.nan

    @property
    def chance(self) -> float:
        """The overlap of positions drawn evenly within every tensor."""
        return self.expected / smaller if (smaller := min(self.counts)) else math.nan

    @property
    def agreement(self) -> float:
        """The share of common numbers that are moved the same way; NaN when there are none, or signs are not known."""
        return self.agreeing / self.signed if self.signed else math.nan

    def __add__(self, other: Meeting) -> Meeting:
        signed = None if self.signed is None or other.signed is None else self.signed + other.signed
        return Meeting(
            (self.counts[0] + other.counts[0], self.counts[1] + other.counts[1]), self.common + other.common,
            self.expected + other.expected, signed, self.agreeing + other.agreeing,
        )  # fmt: skip


@dataclass(frozen=True)
class Overlap:
    """How far deltas meet, pair by pair: `tensors[i, j]` maps names to a `Meeting`, `pairs[i, j]` is their sum."""

    labels: list[str]
    pairs: dict[tuple[int, int], Meeting]
    tensors: dict[tuple[int, int], dict[str, Meeting]] = field(repr=False)

    def matrix(self, what: str = "overlap") -> list[list[float]]:
        """A square of "overlap", "chance" or "agreement", symmetric; 1 on the diagonal (of chance: NaN)."""
        n = len(self.labels)
        square = [[math.nan if what == "chance" else 1.0] * n for _ in range(n)]
        for (i, j), pair in self.pairs.items():
            square[i][j] = square[j][i] = getattr(pair, what)
        return square

    def rows(self, by: str = "pair") -> list[dict[str, Any]]:
        """One dictionary for every pair, or (`by="tensor"`) for every tensor of every pair."""
        rows = []
        for (i, j), total in self.pairs.items():
            for name, m in ({"": total} if by == "pair" else self.tensors[i, j]).items():
                head = {"a": self.labels[i], "b": self.labels[j]} | ({"tensor": name} if name else {})
                rows.append(head | {
                    "count_a": m.counts[0], "count_b": m.counts[1], "common": m.common, "overlap": m.overlap,
                    "chance": m.chance, "signed": m.signed, "agreement": m.agreement,
                })  # fmt: skip
        return rows


def overlap(
    deltas: Sequence[SparseDelta] | Mapping[str, SparseDelta], base: Any = None, labels: Sequence[str] | None = None
) -> Overlap:
    """For every pair of deltas |I1 n I2| / min(K1, K2), and the share of common numbers moved the same way.

    The interference of sparse fine-tunings in two numbers: positions as in LT-SFT (arXiv:2110.07560), signs as in
    TIES (arXiv:2306.01708). A tensor that is stored whole counts with all its numbers. Signs of deltas of mode "set"
    are known beside their `base`. Raises `SurgeryError` for less than two deltas, and for other shapes or bases.
    """
    if isinstance(deltas, Mapping):
        labels, deltas = list(deltas), list(deltas.values())
    labels = list(labels) if labels is not None else [delta.definition for delta in deltas]
    if len(deltas) < 2 or len(labels) != len(deltas):
        raise SurgeryError(f"{len(deltas)} deltas and {len(labels)} labels: two deltas at least are compared.")
    _one_base(deltas)
    signed = [d.added(base) if d.mode == "set" and (base is not None or d.source is not None) else d for d in deltas]
    tensors: dict[tuple[int, int], dict[str, Meeting]] = {}
    for j in range(len(deltas)):
        for i in range(j):
            a, b = signed[i], signed[j]
            known = a.mode == b.mode == "add"
            names = dict.fromkeys([*a.entries, *b.entries])
            tensors[i, j] = {n: _meet(a.entries.get(n), b.entries.get(n), known) for n in names}
    pairs = {pair: sum(found.values(), Meeting()) for pair, found in sorted(tensors.items())}
    return Overlap(labels, pairs, tensors)


def _meet(a: Entry | None, b: Entry | None, known: bool) -> Meeting:
    counts = a.count if a else 0, b.count if b else 0
    if a is None or b is None or not min(counts):
        return Meeting(counts, signed=0 if known else None)
    common = signed = agreeing = 0
    small, large = (b, a) if a.places is None or (b.places is not None and b.count < a.count) else (a, b)
    for first, places, mine in small.pieces():
        if large.places is None:
            span = torch.arange(first, first + mine.numel()) if places is None else places.long()
            theirs = large.values[span]
        else:
            assert places is not None  # where one of them is whole, it is the large one
            mask = members(places, large.places)
            mine = mine[mask]
            theirs = large.values[torch.searchsorted(large.places, places[mask].to(large.places.dtype))]
        common += mine.numel()
        if known:
            signs = _signs(mine) * _signs(theirs)
            signed += int((signs != 0).sum())
            agreeing += int((signs > 0).sum())
    return Meeting(counts, common, counts[0] * counts[1] / a.numel, signed if known else None, agreeing)


def _signs(values: Tensor) -> Tensor:
    return values.sign().to(torch.int8)
