"""Storage forms that lose something: the largest differences, low rank, signs, 8-bit steps. See formats.py."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from surgery.checkpoint.header import dtype_code, torch_dtype
from surgery.errors import SurgeryError
from surgery.weights.formats import BLOCK, FORMS, BFloat16, Delta, Form, Kept, Layout, Note, set_bits, starts_of
from surgery.weights.low_rank import factorise, is_matrix, product
from surgery.weights.sources import ranges
from surgery.weights.sparse import Sparse
from surgery.weights.sparsify import fraction

_plain = BFloat16()
"""For tensors that are no matrices: there is little to gain."""


@FORMS.register("topk")
class TopK(Form):
    """The `density` of largest magnitude: a bit for every number, or (below 1/16) places within blocks of 65,536.

    The values are kept in `dtype`. Ties are broken by index (sparse.py).
    """

    name = "topk"

    def __init__(self, density: float = 0.05, dtype: str = "bfloat16") -> None:
        self.density, self.dtype = fraction(density, "density"), dtype_code(dtype)

    def _sparse(self, delta: Delta) -> Sparse:
        return Sparse(delta.expression, self.density)

    def measure(self, delta: Delta) -> Note:
        sparse = self._sparse(delta)
        counts = [
            int(np.count_nonzero(block.numpy()))
            for start, stop in ranges(delta.numel)
            for block in sparse.flat(delta.name, start, stop).split(BLOCK)
        ]
        starts = starts_of(counts)
        return {"kept": int(starts[-1]), "_starts": starts[:-1], "_sparse": sparse}

    def layout(self, shape: tuple[int, ...], note: Note) -> Layout:
        numel, kept = math.prod(shape), note["kept"]
        if kept == 0:
            return {}
        parts: Layout = {"starts": ("I64", (-(-numel // BLOCK),)), "values": (self.dtype, (kept,))}
        if 16 * kept < numel:
            return parts | {"places": ("U16", (kept,))}
        return parts | {"mask": ("U8", (-(-numel // 8),))}

    def encode(self, delta: Delta, note: Note) -> Iterator[tuple[str, int, Tensor]]:
        parts = self.layout(delta.shape, note)
        if not parts:
            return
        yield "starts", 0, torch.from_numpy(note["_starts"])
        position = 0
        for start, stop in ranges(delta.numel):
            numbers = note["_sparse"].flat(delta.name, start, stop).numpy()
            there = numbers != 0
            places = np.flatnonzero(there)
            yield "values", position, torch.from_numpy(numbers[places]).to(torch_dtype(self.dtype))
            if "mask" in parts:
                yield "mask", start // 8, torch.from_numpy(np.packbits(there, bitorder="little"))
            else:
                yield "places", position, torch.from_numpy((places % BLOCK).astype(np.uint16))
            position += len(places)

    def decode(self, kept: Kept, start: int, stop: int) -> Tensor:
        numbers = torch.zeros(stop - start)
        parts = self.layout(kept.shape, kept.note)
        if not parts or start == stop:
            return numbers
        if "mask" in parts:
            places, first = set_bits(kept, start, stop)
            values = kept.part("values", first, first + len(places))
        else:
            low, high = start // BLOCK, -(-stop // BLOCK)
            starts = kept.part("starts", low, high + 1).numpy()
            bounds = starts if len(starts) > high - low else np.append(starts, kept.note["kept"])
            if (np.diff(bounds) < 0).any() or bounds[0] < 0 or bounds[-1] > kept.note["kept"]:
                raise kept.damaged("has a broken table of contents")
            block = np.repeat(np.arange(low, high) * BLOCK, np.diff(bounds))
            places = block + kept.part("places", int(bounds[0]), int(bounds[-1])).numpy() - start
            inside = (places >= 0) & (places < stop - start)
            values = kept.part("values", int(bounds[0]), int(bounds[-1]))[torch.from_numpy(inside)]
            places = places[inside]
        if len(values) != len(places):
            raise kept.damaged("has fewer values than places")
        numbers.numpy()[places] = values.float().numpy()
        return numbers


@FORMS.register("low_rank")
class LowRankForm(Form):
    """U and V of every matrix, by `rank` (default 16) or `energy`; what is no matrix, or too small, in bfloat16."""

    name = "low_rank"

    def __init__(
        self, rank: int | None = None, energy: float | None = None, dtype: str = "bfloat16", seed: int = 0
    ) -> None:
        self.rank = 16 if rank is None and energy is None else rank
        self.energy, self.dtype, self.seed = energy, dtype_code(dtype), seed

    def measure(self, delta: Delta) -> Note:
        if not is_matrix(delta.shape):
            return {}
        found = factorise(delta.expression, delta.name, rank=self.rank, energy=self.energy, seed=self.seed)
        if found.rank * sum(delta.shape) >= delta.numel:
            return {}
        dtype = torch_dtype(self.dtype)  # at once: all factors are held until they are written
        # The singular values are shared out, so that both factors have numbers of one size.
        roots = found.values.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        factors = (found.left / roots).to(dtype), (found.right * roots[:, None]).to(dtype)
        return {"rank": found.rank, "captured": found.captured, "_factors": factors}

    def layout(self, shape: tuple[int, ...], note: Note) -> Layout:
        if "rank" not in note:
            return _plain.layout(shape, note)
        return {"left": (self.dtype, (shape[0], note["rank"])), "right": (self.dtype, (note["rank"], shape[1]))}

    def encode(self, delta: Delta, note: Note) -> Iterator[tuple[str, int, Tensor]]:
        if "rank" not in note:
            yield from _plain.encode(delta, note)
            return
        left, right = note.pop("_factors")
        yield "left", 0, left
        yield "right", 0, right

    def factors(self, kept: Kept) -> tuple[Tensor, Tensor] | None:
        """left (m x r) and right (r x n), float32; None for what is kept as it is."""
        if "rank" not in kept.note:
            return None
        return kept.part("left").float(), kept.part("right").float()

    def decode(self, kept: Kept, start: int, stop: int) -> Tensor:
        known = self.factors(kept)
        return _plain.decode(kept, start, stop) if known is None else product(*known, start, stop)


@FORMS.register("sign")
class Sign(Form):
    """The sign of every number (0 counts as +) and one scale per matrix, mean |d|, the best in the L2 sense.

    BitDelta, arXiv:2402.10193, section 3.1. What is no matrix is kept in bfloat16.
    """

    name = "sign"

    def layout(self, shape: tuple[int, ...], note: Note) -> Layout:
        if not is_matrix(shape):
            return _plain.layout(shape, note)
        return {"scale": ("F32", (1,)), "signs": ("U8", (-(-math.prod(shape) // 8),))}

    def encode(self, delta: Delta, note: Note) -> Iterator[tuple[str, int, Tensor]]:
        if not is_matrix(delta.shape):
            yield from _plain.encode(delta, note)
            return
        total = 0.0
        for start, stop in ranges(delta.numel):
            numbers = delta.flat(start, stop)
            yield "signs", start // 8, torch.from_numpy(np.packbits(numbers.numpy() >= 0, bitorder="little"))
            total += float(numbers.abs_().sum(dtype=torch.float64))
        yield "scale", 0, torch.tensor([total / delta.numel])

    def decode(self, kept: Kept, start: int, stop: int) -> Tensor:
        if not is_matrix(kept.shape):
            return _plain.decode(kept, start, stop)
        first = start // 8
        packed = kept.part("signs", first, -(-stop // 8)).numpy()
        signs = np.unpackbits(packed, bitorder="little")[start - 8 * first : stop - 8 * first]
        return torch.from_numpy(signs).float().mul_(2).sub_(1).mul_(kept.part("scale")[0])


@FORMS.register("int8")
class Int8(Form):
    """255 steps from -max to +max of each `block` of numbers (64 to 256, a power of two), the scales in float32."""

    name = "int8"

    def __init__(self, block: int = 128) -> None:
        if block not in (32, 64, 128, 256, 512):
            raise SurgeryError(f"The block is {block}; it can be 32, 64, 128, 256 or 512.")
        self.block = block

    def layout(self, shape: tuple[int, ...], note: Note) -> Layout:
        numel = math.prod(shape)
        return {"scales": ("F32", (-(-numel // self.block),)), "steps": ("I8", (numel,))}

    def encode(self, delta: Delta, note: Note) -> Iterator[tuple[str, int, Tensor]]:
        for start, stop in ranges(delta.numel):
            numbers = delta.flat(start, stop)
            count = numbers.numel()
            blocks = torch.nn.functional.pad(numbers, (0, -count % self.block)).view(-1, self.block)
            scales = blocks.abs().amax(1).div_(127)
            steps = blocks.div_(torch.where(scales > 0, scales, 1.0)[:, None]).round_().clamp_(-127, 127)
            yield "scales", start // self.block, scales
            yield "steps", start, steps.to(torch.int8).view(-1)[:count]

    def decode(self, kept: Kept, start: int, stop: int) -> Tensor:
        first = start // self.block
        scales = kept.part("scales", first, -(-stop // self.block)).repeat_interleave(self.block)
        offset = start - first * self.block
        return kept.part("steps", start, stop).float().mul_(scales[offset : offset + stop - start])
