"""Methods that are weighted sums, element by element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.weights.methods.registry import Hidden, PerInput, method, per_input

Normalize = Literal["weights", "count", "none"]
"""What a sum of weighted differences is divided by: the weights that took part, their number, or nothing."""


@method("linear", needs_base=False, unit="element", paper="arXiv:2203.05482")
def linear(
    tuned: Sequence[Tensor], base: Tensor | None = None, *, weight: PerInput[float] = 1.0, normalize: bool = True
) -> Tensor:
    """Weighted average of models (model soup): sum w_i F_i / sum w_i.

    Equal weights, the default, are the uniform soup. Without `normalize` the sum is not divided.
    Raises `SurgeryError` when the weights sum to 0 and are to be normalised. Wortsman et al. 2022, arXiv:2203.05482.
    """
    weights = per_input(weight, len(tuned), "weight")
    total = weighted_sum(tuned, weights)
    return total / weight_sum(weights) if normalize else total


@method("task_arithmetic", needs_base=True, unit="element", paper="arXiv:2212.04089")
def task_arithmetic(
    tuned: Sequence[Tensor],
    base: Tensor,
    *,
    weight: PerInput[float] = 1.0,
    scale: float = 1.0,
    normalize: Normalize = "none",
) -> Tensor:
    """Base plus the scaled sum of task vectors: B + scale * sum w_i (F_i - B).

    Negation is a negative weight, an analogy a +1 and a -1; with one model it is WiSE-FT's interpolation.
    `normalize` divides the sum by the weights' sum (less than 1e-8 counts as 1) or by the number of models.
    Ilharco et al. 2023, arXiv:2212.04089, who choose the scale on held-out data (0.3 to 0.5 without).
    """
    weights = per_input(weight, len(tuned), "weight")
    return base + scale * (weighted_sum([f - base for f in tuned], weights) / divisor(weights, normalize))


@method("lines", needs_base=True, unit="element", paper="arXiv:2410.17146")
def lines(
    tuned: Sequence[Tensor],
    base: Tensor,
    *,
    weight: PerInput[float] = 1.0,
    shallow: float | None = None,
    deep: float = 1.0,
    depth: Hidden[float] = 0.0,
) -> Tensor:
    """Task arithmetic whose scale grows linearly with depth (LiNeS).

    B + (shallow + (deep - shallow) * depth) * sum w_i d_i. `depth` is (layer - 1) / (layers - 1), given by the engine;
    tensors outside the layers count as the first layer, as in the authors' code. `shallow` defaults to 1 / number of
    models; in the paper's letters alpha = shallow and alpha + beta = deep. Wang et al. 2024, arXiv:2410.17146.
    """
    weights = per_input(weight, len(tuned), "weight")
    first = 1.0 / len(tuned) if shallow is None else shallow
    return base + (first + (deep - first) * depth) * weighted_sum([f - base for f in tuned], weights)


@method("passthrough", needs_base=False, unit="element", inputs=(1, 1))
def passthrough(tuned: Sequence[Tensor], base: Tensor | None = None, *, scale: PerInput[float] = 1.0) -> Tensor:
    """One model's tensor as it is, times `scale`: for stacking layers and for copying."""
    (factor,) = per_input(scale, 1, "scale")
    return tuned[0] * factor


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """sum w_i x_i, in the order of the inputs; all weights 1 when none are given."""
    total = torch.zeros_like(tensors[0])
    for x, w in zip(tensors, weights or [1.0] * len(tensors), strict=True):
        total = total + w * x
    return total


def weight_sum(weights: Sequence[float]) -> float:
    """The sum to divide by. Raises `SurgeryError` when it is 0."""
    total = float(sum(weights))
    if abs(total) < 1e-8:
        raise SurgeryError(
            f"The weights {list(weights)} sum to {total:g}: an average over them does not exist.",
            hint="Turn normalising off, or change the weights.",
        )
    return total


def divisor(weights: Sequence[float], normalize: Normalize) -> float:
    """What a sum of weighted differences is divided by; weights that cancel (an analogy) are left undivided."""
    if normalize == "none":
        return 1.0
    total = float(sum(weights)) if normalize == "weights" else float(len(weights))
    return total if abs(total) >= 1e-8 else 1.0
