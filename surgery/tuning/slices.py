"""Weight gradients of chosen rows or columns alone: dW[R] = dY[:, R]^T X and dW[:, C] = dY^T X[:, C].

A forward hook passes a projection's output through a function that is the identity, and whose backward pass multiplies
the slice out of what comes back. The weight itself is frozen, so the product for the rest of it is never made, and for
columns only those of the input are kept. The module stays what it was: other hooks see the same inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from surgery.tuning.selection.places import Slice

Take = Callable[[Tensor], None]
"""Receives the slice's gradient, flat and in the order of the weight's positions."""


def slice_gradients(module: nn.Module, part: Slice, transposed: bool, take: Take) -> RemovableHandle:
    """Calls `take` in every backward pass through a linear `module`; `transposed` as in GPT-2's Conv1D."""
    anchor = torch.zeros((), requires_grad=True)  # makes the output part of the graph, whatever else is frozen
    outputs = (part.dim == 0) != transposed  # rows of (out, in) are outputs

    def hook(called: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if called is not module or not torch.is_grad_enabled():  # a copy of the model brings the hook along
            return output
        index = part.index.to(output.device)
        kept = args[0] if outputs else args[0].index_select(-1, index)
        return _Slice.apply(output, anchor, kept.detach(), index if outputs else None, transposed, take)

    return module.register_forward_hook(hook)


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
