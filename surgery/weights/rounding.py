"""Rounding to a storage type: to the nearest number, or up and down by chance so that the mean is right."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from surgery.weights.sparsify import random_bits

_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_CHANCE = 2.0**-16


def round_to(numbers: Tensor, dtype: torch.dtype, key: int | None = None, offset: int = 0) -> Tensor:
    """Flat `numbers` (float32 or float64) in `dtype`: the nearest, or with a `key` one of the two neighbours.

    Each neighbour has a chance in proportion to how near it is, in steps of 2^-16, so that the expected value is the
    number itself. Element i sees the bits of place `offset` + i of the stream `key`, whatever the chunks. What is
    exact, or beyond the type's range, is not left to chance.
    """
    nearest = numbers.to(dtype)
    if key is None or dtype not in _BITS or dtype == numbers.dtype or not numbers.numel():
        return nearest
    back = nearest.to(numbers.dtype)
    error = numbers - back
    bits = nearest.view(_BITS[dtype])
    # Next to a number of the same sign lie its bits plus or minus one; next to zero, the smallest of the error's sign.
    outwards = (error > 0) == (back > 0)
    first = torch.where(error < 0, torch.iinfo(bits.dtype).min + 1, 1).to(bits.dtype)
    other = torch.where(back == 0, first, bits + outwards.to(bits.dtype) * 2 - 1).view(dtype)
    gap = other.to(numbers.dtype) - back
    chance = torch.where((error != 0) & gap.isfinite(), error / gap, 0.0)
    draw = random_bits(numbers.numel(), key, offset, 16).astype(np.float32) * _CHANCE
    return torch.where(torch.from_numpy(draw).to(chance.dtype) < chance, other, nearest)
