"""How a number that is learned becomes a mask between 0 (patched) and 1 (kept), and what sparsity costs.

| gate | mask w | penalty | source |
|---|---|---|---|
| `linear` | the number, clamped to 0..1 before each pass (projected gradient) | sum of 1 - w | arXiv:2402.14811 |
| `sigmoid` | sigmoid(a) | sum of 1 - w | |
| `hard_concrete` | 1 - g, g a stretched and clamped concrete variable | sum of P(g != 0) | arXiv:1712.01312 |

A new gate is a function of this kind and one line with `@GATES.register`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.registry import Registry


@dataclass(frozen=True)
class Gate:
    """What is learned (components,), and how it is read."""

    start: float
    """Where every number begins: all is kept, or nearly."""
    drawn: Callable[[Tensor, torch.Generator], Tensor]
    """The mask of one step in training, differentiable; a stochastic gate draws from the generator."""
    kept: Callable[[Tensor], Tensor]
    """The mask in evaluation."""
    penalty: Callable[[Tensor], Tensor]
    """What is patched, as one number: lambda times it is added to the loss."""
    project: Callable[[Tensor], object] = lambda number: None
    """Puts the numbers back where they are allowed to be, in place, before each step."""


GATES: Registry[Gate] = Registry("gate")

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature and limits of the stretch, those of Louizos et al. 2018."""


def _hard(concrete: Tensor) -> Tensor:
    """A concrete variable in (0, 1), stretched to (GAMMA, ZETA) and clamped to [0, 1]."""
    return (concrete * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def _hard_concrete(log_alpha: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.rand(log_alpha.shape, generator=generator).to(log_alpha.device).clamp(1e-6, 1 - 1e-6)
    return 1 - _hard(((noise.log() - (1 - noise).log() + log_alpha) / BETA).sigmoid())


GATES.register("linear")(
    Gate(
        start=1.0,
        drawn=lambda number, generator: number,
        kept=lambda number: number.clamp(0, 1),
        penalty=lambda number: (1 - number).sum(),
        project=lambda number: number.clamp_(0, 1),
    )
)
GATES.register("sigmoid")(
    Gate(
        start=3.0,  # w = 0.95
        drawn=lambda number, generator: number.sigmoid(),
        kept=torch.sigmoid,
        penalty=lambda number: (1 - number.sigmoid()).sum(),
    )
)
GATES.register("hard_concrete")(
    Gate(
        start=-2.0,  # w = 0.96 in evaluation, and P(g != 0) = 0.40: some are patched in every step
        drawn=_hard_concrete,
        kept=lambda log_alpha: 1 - _hard(log_alpha.sigmoid()),
        penalty=lambda log_alpha: (log_alpha - BETA * torch.tensor(-GAMMA / ZETA).log()).sigmoid().sum(),
    )
)
