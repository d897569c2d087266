"""Norms to first order: the gradient in front of one from that behind it, for many readers of one stream at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_LARGE = 1024.0
"""Where a norm's epsilon says nothing."""
_EPSILON = 1e-3
"""No norm has a greater one."""


@dataclass(frozen=True)
class Statistics:
    """A norm at some tokens: `weight * unit` plus a bias, `unit = scale * (x - mean)`, or without the mean."""

    weight: Tensor
    """(d_model,) as it is multiplied with, whatever the module makes of its parameter."""
    scale: Tensor
    """(batch, pos, 1)."""
    unit: Tensor
    """(batch, pos, d_model)."""
    centred: bool

    def pull(self, scaled: Tensor) -> Tensor:
        """Gradients in front of the norm, in place of `scaled`: those behind it times weight and scale.

        (batch, reader, pos, d_model). With g behind: s (wg - mean(wg) - unit mean(unit wg)).
        """
        if self.centred:
            scaled -= scaled.mean(-1, keepdim=True)
        along = torch.einsum("brtd,btd->brt", scaled, self.unit) / scaled.shape[-1]
        return scaled.addcmul_(along[..., None], self.unit[:, None], value=-1)


def statistics(norm: nn.Module, stream: Tensor) -> Statistics | None:
    """Those of a layer norm or a root-mean-square norm, in float32; None for a norm that is neither."""
    x = stream.detach().float()
    if type(norm) is nn.LayerNorm:
        middle = x - x.mean(-1, keepdim=True)
        scale = (middle.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        weight = torch.ones_like(x[0, 0]) if norm.weight is None else norm.weight.detach().float()
        return Statistics(weight, scale, middle * scale, True)
    with torch.no_grad():  # by `forward`: hooks of a pass that is under way are none of ours
        weight = norm.forward(stream.new_full((1, stream.shape[-1]), _LARGE))[0].float()
        normed = norm.forward(stream).float()
    weighted = weight * x
    scale = (normed * weighted).sum(-1, keepdim=True) / weighted.square().sum(-1, keepdim=True).clamp(min=1e-30)
    precise, size = 16 * torch.finfo(stream.dtype).eps, x.square().mean(-1, keepdim=True)
    epsilon = scale.pow(-2) - size  # the norm's own, if it divides by the root of mean square and epsilon
    fits = (epsilon >= -8 * precise * size) & (epsilon <= 8 * precise * size + _EPSILON)
    if not (bool(fits.all()) and torch.allclose(scale * weighted, normed, atol=precise * float(normed.abs().max()))):
        return None
    return Statistics(weight, scale, x * scale, False)


def pulled(norm: Any, stream: Tensor, behind: Tensor) -> Tensor:
    """The same for any norm, by autograd: (batch, reader, pos, d_model), each reader with a copy of the stream."""
    copies = stream[:, None].expand_as(behind).detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(norm.forward(copies), copies, behind.to(stream.dtype))[0].float()
