"""Weight gradients of chosen numbers of a projection, without the dense gradient of its weight.

    rows       dW[R]    = dY[:, R]^T X
    columns    dW[:, C] = dY^T X[:, C]
    scattered  dW       = dY^T X, a block of rows at a time, of which the chosen numbers are kept

Hooks hide the weight from autograd while the projection computes, and pass its output through a function that is the
identity, and whose backward pass makes these products of what comes back. For rows and columns the rest of the product
is never made, and for columns only those of the input are kept; scattered numbers save memory alone. What else a weight
is used for (a penalty on it) has its gradient as ever, and so has the module: other hooks see what they saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from surgery.tuning.selection.places import Slice

Take = Callable[[Tensor], None]
"""Receives the gradient of the chosen numbers, flat and in the order of the weight's positions."""
Wanted = Callable[[], bool]
"""Whether somebody listens."""
BLOCK = 1 << 18
"""Numbers of a dense gradient that are there at a time: they fit into a processor's cache."""


def is_projection(module: nn.Module) -> bool:
    """Whether its forward is x W^T + b and nothing else, or GPT-2's x W + b."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def slice_gradients(module: nn.Module, part: Slice, take: Take, wanted: Wanted) -> list[RemovableHandle]:
    """Calls `take` with the gradient of rows or columns, in backward passes of forward passes where it is `wanted`."""
    transposed = type(module).__name__ == "Conv1D"
    outputs = (part.dim == 0) != transposed  # rows of (out, in) are outputs

    def wrapped(x: Tensor, output: Tensor, anchor: Tensor) -> Tensor:
        index = part.index.to(output.device)
        kept = x if outputs else x.index_select(-1, index)
        return _Slice.apply(output, anchor, kept.detach(), index if outputs else None, transposed, take)

    return _hooked(module, wrapped, wanted)


def scattered_gradients(module: nn.Module, places: Tensor, take: Take, wanted: Wanted) -> list[RemovableHandle]:
    """Calls `take` with the gradient at `places` (sorted flat positions), as `slice_gradients` does."""
    weight: Any = module.weight
    (rows, columns), transposed = weight.shape, type(module).__name__ == "Conv1D"
    step = max(1, BLOCK // columns)
    starts = torch.arange(0, rows, step)
    edges = [*torch.searchsorted(places.cpu(), (starts * columns).to(places.dtype)).tolist(), len(places)]
    blocks = [(a, min(a + step, rows), edges[i], edges[i + 1]) for i, a in enumerate(starts.tolist())]

    def wrapped(x: Tensor, output: Tensor, anchor: Tensor) -> Tensor:
        return _Scattered.apply(output, anchor, x.detach(), places.to(output.device), blocks, transposed, take)

    return _hooked(module, wrapped, wanted)


_resting = 0
"""How many callers look at gradients of their own."""


@contextmanager
def resting() -> Iterator[None]:
    """Inside, no projection makes products of its own: what flows is left to others who look at gradients."""
    global _resting
    _resting += 1
    try:
        yield
    finally:
        _resting -= 1


def _hooked(
    module: nn.Module, wrapped: Callable[[Tensor, Tensor, Tensor], Tensor], wanted: Wanted
) -> list[RemovableHandle]:
    """While the projection computes, autograd does not see its weight; what else the weight is used for, it does."""
    anchor = torch.zeros((), requires_grad=True)  # makes the output part of the graph, whatever else is frozen
    weight: Any = module.weight
    unseen = False

    def before(called: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal unseen
        # A copy of the model brings hooks along; of several optimizers of one model only one listens.
        if called is module and wanted() and not _resting and torch.is_grad_enabled():
            unseen = weight.requires_grad
            weight.requires_grad_(False)

    def behind(called: nn.Module, args: tuple[Tensor, ...], output: Tensor | None) -> Tensor | None:
        nonlocal unseen
        if called is not module or not unseen:
            return output
        unseen = False
        weight.requires_grad_(True)
        return None if output is None else wrapped(args[0], output, anchor)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(behind, always_call=True)]


class _Slice(torch.autograd.Function):
    """The identity of an output; backward takes the slice's gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, kept: Tensor, rows: Tensor | None, transposed: bool,
                take: Take) -> Tensor:  # fmt: skip
        ctx.save_for_backward(kept, rows)
        ctx.transposed, ctx.take = transposed, take
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = gradients
        kept, rows = ctx.saved_tensors
        out = back if rows is None else back.index_select(-1, rows)
        out, inner = out.reshape(-1, out.shape[-1]), kept.reshape(-1, kept.shape[-1]).to(out.dtype)
        ctx.take((inner.T @ out if ctx.transposed else out.T @ inner).reshape(-1))
        return back, None, None, None, None, None


class _Scattered(torch.autograd.Function):
    """The identity of an output; backward takes the gradient of scattered numbers."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, kept: Tensor, places: Tensor,
                blocks: list[tuple[int, int, int, int]], transposed: bool, take: Take) -> Tensor:  # fmt: skip
        ctx.save_for_backward(kept, places)
        ctx.blocks, ctx.transposed, ctx.take = blocks, transposed, take
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = gradients
        kept, places = ctx.saved_tensors
        out = back.reshape(-1, back.shape[-1])
        inner = kept.reshape(-1, kept.shape[-1]).to(out.dtype)
        left, right = (inner, out) if ctx.transposed else (out, inner)
        values, columns = out.new_empty(len(places)), right.shape[1]
        memory = out.new_empty(ctx.blocks[0][1], columns)
        for first, last, start, stop in ctx.blocks:
            block = torch.mm(left[:, first:last].T, right, out=memory[: last - first])
            torch.index_select(block.view(-1), 0, places[start:stop] - first * columns, out=values[start:stop])
        ctx.take(values)
        return back, None, None, None, None, None, None
