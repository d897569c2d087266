"""The forms in which a task vector is stored: one class each, which says what is kept of a tensor and gives it back.

| form     | kept per tensor                                                   | bytes per number, 16-bit model |
|----------|-------------------------------------------------------------------|--------------------------------|
| lossless | a bit for every number, the tuned model's own bits where it moved | 1/8 + 2p (p: share that moved) |
| float32  | the difference in float32: exact for 16-bit models                | 4                              |
| bfloat16 | the difference in bfloat16                                        | 2                              |
| topk     | the largest differences                                           | 1/8 + 2k or 4k (k: density)    |
| low_rank | U and V of each matrix                                            | 2 (m + n) r / (m n)            |
| sign     | signs, and a mean for each matrix                                 | 1/8                            |
| int8     | 8-bit steps, and a scale for each block                           | 1 + 4 / block                  |

The last four lose something and are in compressed.py. A new form is one class and one row. How they are
put into a file: vector_file.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from surgery.checkpoint import Source
from surgery.checkpoint.header import ITEM_BYTES, torch_dtype
from surgery.checkpoint.provenance import Checksum
from surgery.errors import SurgeryError
from surgery.registry import Registry
from surgery.weights.expression import Expression
from surgery.weights.sources import flat, ranges, row_blocks

FORMS: Registry[type[Form]] = Registry("storage form")
BLOCK = 1 << 16
"""Numbers between two entries of a table of contents, so that any range can be read without what stands before it."""
PIECE = 1 << 19
"""Numbers that the lossless form compares at once: half and twice as many took a tenth longer."""

Note = dict[str, Any]
"""What a form has to remember of one tensor: JSON, except keys with an underscore, which live only while writing."""
Layout = dict[str, tuple[str, tuple[int, ...]]]
"""The stored parts of one tensor: part -> (type, shape). The part "" is stored under the tensor's own name."""


@dataclass(frozen=True)
class Delta:
    """One tensor of a vector that is being written."""

    expression: Expression
    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def flat(self, start: int, stop: int) -> Tensor:
        return self.expression.flat(self.name, start, stop)


@dataclass(frozen=True)
class Kept:
    """One tensor of a vector that is being read: `part(part, start, stop)` gives rows of what was stored."""

    name: str
    shape: tuple[int, ...]
    note: Note
    part: Callable[..., Tensor]
    base: Source | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def damaged(self, what: str) -> SurgeryError:
        return SurgeryError(f"The stored vector is damaged: tensor '{self.name}' {what}.", hint="Extract it again.")


class Form:
    """How one tensor's difference is kept. Options are keyword arguments of the constructor, kept in the file."""

    name: ClassVar[str]
    exact: ClassVar[bool] = False

    @property
    def options(self) -> dict[str, Any]:
        return vars(self)

    def measure(self, delta: Delta) -> Note:
        """A first pass over the data, where the size of what is stored depends on them.

        A form that reads the base's stored numbers here may put their checksum under "_checksum".
        """
        return {}

    def layout(self, shape: tuple[int, ...], note: Note) -> Layout:
        """What is stored for a tensor of `shape`."""
        raise NotImplementedError

    def encode(self, delta: Delta, note: Note) -> Iterator[tuple[str, int, Tensor]]:
        """The stored parts piece by piece: (part, first row, rows)."""
        raise NotImplementedError

    def decode(self, kept: Kept, start: int, stop: int) -> Tensor:
        """Numbers `start:stop` of the difference, float32, in memory of its own."""
        raise NotImplementedError


class Dense(Form):
    """The difference itself, rounded to a type."""

    code: ClassVar[str]

    def layout(self, shape: tuple[int, ...], note: Note) -> Layout:
        return {"": (self.code, shape)}

    def encode(self, delta: Delta, note: Note) -> Iterator[tuple[str, int, Tensor]]:
        dtype = torch_dtype(self.code)
        for row, start, stop in row_blocks(delta.shape):
            rows = torch.empty(stop - start, dtype=dtype)
            for a, b in ranges(stop - start):
                rows[a:b] = delta.flat(start + a, start + b)
            yield "", row, rows

    def decode(self, kept: Kept, start: int, stop: int) -> Tensor:
        cols = max(1, math.prod(kept.shape[1:]))
        first, last = start // cols, -(-stop // cols)
        rows = kept.part("", first, last).reshape(-1)[start - first * cols : stop - first * cols]
        return rows.to(torch.float32, copy=True)


@FORMS.register("float32")
class Float32(Dense):
    """F - B in float32. For 16-bit models the float32 difference is exact, and B + (F - B) rounds back to F."""

    name, code, exact = "float32", "F32", True


@FORMS.register("bfloat16")
class BFloat16(Dense):
    """F - B in bfloat16: 0.02 to 1.7 % of a bfloat16 model's numbers come back changed."""

    name, code = "bfloat16", "BF16"


@FORMS.register("lossless")
class Lossless(Form):
    """A bit for every number that differs from the base, and the tuned model's own bits there.

    Exact to the bit at scale 1, whatever the types: the base is brought into the tuned type first. To be read as
    numbers it needs its base. A tensor without a change keeps nothing; one that changed nearly everywhere is kept
    whole.
    """

    name, exact = "lossless", True

    def measure(self, delta: Delta) -> Note:
        dtype = delta.expression.exact(delta.name)
        if dtype is None:
            raise SurgeryError(
                f"Only a plain difference of two models is lossless, and this is {delta.expression}.",
                hint="Save it in the form float32: --form float32, in Python form='float32'.",
            )
        counts: list[int] = []
        checksum = Checksum()
        for start, stop in ranges(delta.numel, PIECE):
            base, tuned = _pair(delta, start, stop, checksum)
            changed = base != tuned
            counts += [int(np.count_nonzero(changed[a:b])) for a, b in ranges(stop - start, BLOCK)]
        starts = starts_of(counts)
        return {"dtype": dtype, "changed": int(starts[-1]), "_starts": starts[:-1], "_checksum": checksum.hexdigest()}

    def layout(self, shape: tuple[int, ...], note: Note) -> Layout:
        numel, changed, dtype = math.prod(shape), note["changed"], note["dtype"]
        if changed == 0:
            return {}
        bits, blocks = -(-numel // 8), -(-numel // BLOCK)
        if bits + 8 * blocks + changed * ITEM_BYTES[dtype] >= numel * ITEM_BYTES[dtype]:
            return {"whole": (dtype, (numel,))}
        return {"starts": ("I64", (blocks,)), "mask": ("U8", (bits,)), "values": (dtype, (changed,))}

    def encode(self, delta: Delta, note: Note) -> Iterator[tuple[str, int, Tensor]]:
        parts = self.layout(delta.shape, note)
        dtype = torch_dtype(note["dtype"])
        if "starts" in parts:
            yield "starts", 0, torch.from_numpy(note["_starts"])
        position = 0
        for start, stop in ranges(delta.numel, PIECE) if parts else ():
            base, tuned = _pair(delta, start, stop)
            if "whole" in parts:
                values, row = tuned, start
            else:
                changed = base != tuned
                yield "mask", start // 8, torch.from_numpy(np.packbits(changed, bitorder="little"))
                values, row = tuned.take(np.flatnonzero(changed)), position
                position += len(values)
            numbers = torch.from_numpy(values).view(dtype)
            if not bool(torch.isfinite(numbers.sum(dtype=torch.float32))):
                delta.expression.refuse(delta.name, numbers)
            yield "whole" if "whole" in parts else "values", row, numbers

    def restore(self, kept: Kept, start: int, stop: int, base: Tensor) -> Tensor:
        """The tuned model's bits of a range, from the base's numbers there."""
        dtype = torch_dtype(kept.note["dtype"])
        parts = self.layout(kept.shape, kept.note)
        if "whole" in parts:
            return kept.part("whole", start, stop)
        bits = _bits(base.to(dtype)).copy()  # numpy's: its memory is used again, torch's comes fresh from the system
        if parts:
            positions, first = set_bits(kept, start, stop)
            values = kept.part("values", first, first + len(positions))
            if len(values) != len(positions):
                raise kept.damaged("has fewer values than its mask says")
            bits[positions] = _bits(values)
        return torch.from_numpy(bits).view(dtype)

    def decode(self, kept: Kept, start: int, stop: int) -> Tensor:
        if kept.note["changed"] == 0:
            return torch.zeros(stop - start)
        if kept.base is None or kept.name not in kept.base.tensors:
            raise SurgeryError(
                "A lossless vector keeps the tuned model's bits; to read it as numbers its base is needed.",
                hint="Name it: --base BASE, in Python TaskVector.load(path, base=BASE).",
            )
        base = flat(kept.base, kept.name, start, stop)
        tuned = self.restore(kept, start, stop, base)
        if torch.float64 in (base.dtype, tuned.dtype):
            return (tuned.double() - base.double()).float()
        return tuned.to(torch.float32, copy=True).sub_(base.float())


def _bits(numbers: Tensor) -> np.ndarray:
    """The storage bits of flat numbers, as integers of the same width, sharing memory."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[numbers.element_size()]
    return numbers.view(width).numpy()


def _pair(delta: Delta, start: int, stop: int, checksum: Checksum | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The bits of base and tuned model, both in the tuned type; `checksum` is fed with the base as it is stored."""
    (anchor,) = delta.expression.anchors()
    if anchor.source is None:
        raise SurgeryError(f"{delta.expression} can't be written without its base at hand.",
                           hint="Name it: --base BASE, in Python TaskVector.load(path, base=BASE).")  # fmt: skip
    base = flat(anchor.source, delta.name, start, stop)
    if checksum is not None:
        checksum.update(base)  # here, where the numbers are in the cache anyway
    tuned = delta.expression.restored(delta.name, start, stop, base)
    return _bits(base.to(tuned.dtype)), _bits(tuned.contiguous())


def starts_of(counts: Sequence[int]) -> np.ndarray:
    """How many numbers stand before each block, and how many there are in all (int64)."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def set_bits(kept: Kept, start: int, stop: int) -> tuple[np.ndarray, int]:
    """Where in `start:stop` the mask is set (from `start` on), and the number of set bits before `start`."""
    block = start // BLOCK
    before = int(kept.part("starts", block, block + 1)[0])
    if before < 0:
        raise kept.damaged("has a broken table of contents")
    skipped = start - block * BLOCK
    low, high = block * BLOCK // 8, -(-stop // 8)
    bits = np.unpackbits(kept.part("mask", low, high).numpy(), bitorder="little")[: stop - block * BLOCK]
    bits = bits.view(bool)  # the same bytes: numpy counts and finds booleans several times faster
    if skipped:
        before += int(np.count_nonzero(bits[:skipped]))
    return np.flatnonzero(bits[skipped:]), before
