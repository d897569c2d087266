"""Sparse codes of a dictionary, forward and backward, without a dense batch-by-latents tensor.

    h = (x - c) E^T + b                  blocks of rows, so that h is never there as a whole
    codes: the positive numbers of h that a rule chooses, as (row, latent, value), ordered by row
    y = sum of value x D[latent] + b_dec, by row

Only the product for h is dense. Gradients are those of the dense form to float rounding: dE = S^T (x - c) and
dD = V^T dy, where V holds the values and S their gradients, are sums of rows by latent, and S itself are the products
of dy and D at the chosen places. A number that the ReLU holds at 0 is no code and has no gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 21
"""Numbers of h that are there at a time."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Which rows use which latents: `index` (n,) the latents, row by row; `starts` (rows + 1,) where rows begin."""

    index: Tensor
    starts: Tensor
    latents: int

    @classmethod
    def of(cls, used: Tensor, index: Tensor, latents: int) -> Layout:
        """From (rows, k): the latents in `index` where `used` is True."""
        counts = used.sum(1)
        return cls(index[used], torch.cat([counts.new_zeros(1), counts.cumsum(0)]), latents)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def rows(self) -> Tensor:
        """(n,) the row of each code."""
        counts = self.starts.diff()
        return torch.arange(len(self), device=counts.device).repeat_interleave(counts)

    @cached_property
    def fired(self) -> Tensor:
        """(latents,) how many rows use each latent."""
        return torch.bincount(self.index, minlength=self.latents)

    @cached_property
    def _turned(self) -> tuple[Tensor, Tensor, Tensor]:
        """The codes by latent: their order, their rows, and where each latent begins."""
        order = self.index.argsort(stable=True)
        starts = torch.cat([self.fired.new_zeros(1), self.fired.cumsum(0)])
        return order, self.rows[order], starts[:-1]

    def by_row(self, values: Tensor, weight: Tensor) -> Tensor:
        """(rows, d) sum over each row's codes of value x row of `weight` (latents, d)."""
        return _sums(self.index, weight, self.starts[:-1], values)

    def by_latent(self, values: Tensor, x: Tensor) -> Tensor:
        """(latents, d) sum over each latent's codes of value x row of `x` (rows, d)."""
        order, rows, starts = self._turned
        return _sums(rows, x, starts, values[order])

    def products(self, x: Tensor, weight: Tensor) -> Tensor:
        """(n,) of each code the product of its row of `x` (rows, d) and its row of `weight` (latents, d)."""
        with warnings.catch_warnings():  # "sparse CSR tensor support is in beta state"
            warnings.simplefilter("ignore", UserWarning)
            places = torch.sparse_csr_tensor(
                self.starts, self.index, x.new_zeros(len(self.index)), (len(self), self.latents), check_invariants=False
            )
            return torch.sparse.sampled_addmm(places, x, weight.T, beta=0.0).values()


@dataclass(frozen=True, eq=False)
class Codes:
    """The values of codes (above 0, but for those of dead latents, chosen beside), and whose they are."""

    values: Tensor
    layout: Layout

    def dense(self) -> Tensor:
        """(rows, latents): for a look, and for tests."""
        zeros = self.values.new_zeros(len(self.layout), self.layout.latents)
        return zeros.index_put((self.layout.rows, self.layout.index), self.values)

    def only(self, keep: Tensor) -> Codes:
        """The same with 0 where `keep` (n,) is False."""
        return Codes(self.values * keep, self.layout)


Pre = Callable[[slice], Tensor]
"""Scores of some rows, (rows, latents): to be read before the next are asked for, whose place is the same."""


@dataclass(frozen=True, eq=False)
class Pick:
    """How codes are chosen: by scores, which are h, or h times `scale`.

    With the norms of the decoder's rows as `scale` it is the choice of a dictionary whose decoder rows have norm 1,
    without projecting them (SAELens' rescale_acts_by_decoder_norm; what is rebuilt is the same, since f / norm times
    norm is f).
    """

    choose: Callable[[Pre, int], Sequence[tuple[Tensor, Layout]]]
    """(scores of some rows, number of rows) -> one set of codes or more: their scores, and their layout."""
    scale: Tensor | None = None
    """(latents,) not below 0."""


def encode(x: Tensor, weight: Tensor, bias: Tensor, center: Tensor | None, pick: Pick) -> list[Codes]:
    """Codes of `x` (rows, d) by `weight` (latents, d): the pre-activations that `pick` chooses, one set or more.

    `center` is subtracted from `x` first. Gradients flow to all of them that ask for one.
    """
    layouts: list[Layout] = []
    values = _Encode.apply(x, weight, bias, center, pick, layouts)
    return [Codes(v, layout) for v, layout in zip(values, layouts, strict=True)]


def decode(codes: Codes, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(rows, d) sum of values times rows of `weight` (latents, d), plus `bias`."""
    found: Tensor = _Decode.apply(codes.values, weight, codes.layout)
    return found if bias is None else found + bias


def blocks(rows: int, latents: int) -> list[slice]:
    """Rows that are encoded at a time; of no rows one block without any."""
    step = max(1, BLOCK // latents)
    return [slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step)]


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, center: Tensor | None, pick: Pick, layouts: list[Layout]
    ) -> tuple[Tensor, ...]:
        moved, scale = x if center is None else x - center, pick.scale
        weighed = (weight, bias) if scale is None else (weight * scale[:, None], bias * scale)  # not h: less to write
        place = x.new_empty(blocks(len(x), len(weight))[0].stop, len(weight))  # one for all blocks

        def scores(rows: slice) -> Tensor:
            return torch.addmm(weighed[1], moved[rows], weighed[0].T, out=place[: rows.stop - rows.start])

        chosen = pick.choose(scores, len(x))
        layouts += [layout for _, layout in chosen]
        ctx.save_for_backward(moved, weight)
        ctx.layouts, ctx.centered = list(layouts), center is not None
        if scale is None:
            return tuple(found for found, _ in chosen)
        some = scale.clamp(min=torch.finfo(scale.dtype).tiny)
        return tuple(found / some[layout.index] for found, layout in chosen)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        moved, weight = ctx.saved_tensors
        sets = list(zip(ctx.layouts, gradients, strict=True))
        d_weight = _total(layout.by_latent(gradient, moved) for layout, gradient in sets)
        d_bias = weight.new_zeros(len(weight))
        for layout, gradient in sets:
            d_bias.index_add_(0, layout.index, gradient)
        d_x = _total(layout.by_row(gradient, weight) for layout, gradient in sets) if ctx.needs_input_grad[0] else None
        d_center = -(d_bias @ weight) if ctx.centered and ctx.needs_input_grad[3] else None
        return d_x, d_weight, d_bias, d_center, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.layout = layout
        return layout.by_row(values, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = gradients
        values, weight = ctx.saved_tensors
        d_values = ctx.layout.products(back, weight) if ctx.needs_input_grad[0] else None
        d_weight = ctx.layout.by_latent(values, back) if ctx.needs_input_grad[1] else None
        return d_values, d_weight, None


def _total(parts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.Tensor.add_, parts)


def _sums(index: Tensor, table: Tensor, starts: Tensor, values: Tensor) -> Tensor:
    return torch.nn.functional.embedding_bag(index, table, starts, per_sample_weights=values, mode="sum")
