"""How well a dictionary does: over whole sets of activations, streamed; and against directions that are known.

FVU is the unexplained share of the variance about the mean of *all* rows. (A mean of the FVU of batches, or about the
means of batches, is another number: of few rows a batch it is biased.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.sae.dictionary import Dictionary


@dataclass(frozen=True, eq=False)
class Quality:
    """What `measure` finds. Shares are of 1."""

    rows: int
    fvu: float
    """Unexplained share of the variance; for constant activations 0 where they are rebuilt, else 1."""
    l0: float
    """Codes a row."""
    cosine: float
    """Between a row and its reconstruction, mean over rows that are not 0."""
    shrinkage: float
    """Length of the reconstruction over that of the row, mean over rows that are not 0: below 1 it shrinks."""
    dead: float
    """Share of latents that no row uses."""
    density: Tensor
    """(latents,) share of rows that use each."""

    @property
    def explained(self) -> float:
        """1 - FVU."""
        return 1 - self.fvu

    def to_dict(self) -> dict[str, float]:
        """The numbers, without the density of each latent."""
        return {k: float(v) for k, v in vars(self).items() if k != "density"}


@torch.no_grad()
def measure(dictionary: Dictionary, batches: Iterable[Tensor], targets: Iterable[Tensor] | None = None) -> Quality:
    """One pass over `batches` of rows (n, d_in), and of `targets` (n, d_out) for transcoders; sums in float64.

    Raises `SurgeryError` without rows.
    """
    count = codes = some = 0
    error = squares = cosine = ratio = 0.0
    total: Tensor | None = None
    origin: Tensor | None = None
    fired = torch.zeros(dictionary.latents, dtype=torch.long)
    for x, y in ((b, b) for b in batches) if targets is None else zip(batches, targets, strict=True):
        if not len(x):  # a batch of which no token counts
            continue
        found = dictionary.codes(x)
        output, wanted = dictionary.from_codes(found, x).double(), y.double()
        origin = wanted.mean(0) if origin is None else origin  # a variance about something near: nothing cancels
        total = torch.zeros_like(origin) if total is None else total
        count, codes = count + len(x), codes + len(found.values)
        error += float((output - wanted).square().sum())
        squares += float((wanted - origin).square().sum())
        total += (wanted - origin).sum(0)
        there = wanted.norm(dim=1) > 0
        some += int(there.sum())
        cosine += float(torch.cosine_similarity(output, wanted, dim=1)[there].sum())
        ratio += float((output.norm(dim=1) / wanted.norm(dim=1))[there].sum())
        fired += found.layout.fired.cpu()
    if total is None:
        raise SurgeryError("There are no activations to measure a dictionary on.")
    variance = squares - float(total.square().sum()) / count
    constant = variance <= 1e-12 * max(squares, 1e-30)
    fvu = float(error > 1e-10 * count) if constant else error / variance
    dead = float((fired == 0).double().mean())
    return Quality(count, fvu, codes / count, cosine / max(1, some), ratio / max(1, some), dead, fired.double() / count)


def max_cosines(true: Tensor, found: Tensor) -> Tensor:
    """(n,) of each of the `true` directions (n, d) the largest cosine with one of `found` (m, d)."""
    unit = [rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12) for rows in (true, found)]
    return (unit[0] @ unit[1].T).amax(1)


def recovered(true: Tensor, found: Tensor, at: float = 0.9) -> dict[str, float]:
    """MMCS, the mean of `max_cosines` (arXiv:2309.08600), and recall, the share of them above `at`."""
    cosines = max_cosines(true, found)
    return {"mmcs": float(cosines.mean()), "recall": float((cosines > at).double().mean())}


@dataclass(frozen=True)
class Planted:
    """Rows that are sums of a few known directions: what a dictionary ought to find.

    Each of `n` unit directions in `d` dimensions is on with probability `rate`, of a size from `low` to 1, plus noise.
    """

    d: int = 32
    n: int = 64
    rate: float = 0.03
    low: float = 0.5
    noise: float = 0.0
    seed: int = 0

    @property
    def directions(self) -> Tensor:
        """(n, d) of length 1."""
        rows = torch.randn(self.n, self.d, generator=torch.Generator().manual_seed(self.seed))
        return rows / rows.norm(dim=1, keepdim=True)

    def rows(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(count, d) rows and the (count, n) sizes that they are made of."""
        generator = torch.Generator().manual_seed((self.seed << 20) + seed)
        on = torch.rand(count, self.n, generator=generator) < self.rate
        sizes = on * (self.low + (1 - self.low) * torch.rand(count, self.n, generator=generator))
        return sizes @ self.directions + self.noise * torch.randn(count, self.d, generator=generator), sizes
