"""Methods that decide element by element which task vectors speak."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.weights import sparsify
from surgery.weights.methods.linear import weighted_sum
from surgery.weights.methods.registry import method
from surgery.weights.methods.sparse import elect
from surgery.weights.sparsify import fraction


@method("sce", needs_base=True, unit="tensor", paper="arXiv:2408.07990")
def sce(
    tuned: Sequence[Tensor],
    base: Tensor,
    *,
    topk: float = 0.1,
    scale: float = 1.0,
    ties: Literal["index", "all", "none"] = "index",
) -> Tensor:
    """Select where the tasks differ most, weight each task by its energy there, erase minority signs (SCE).

    Keeps the `topk` share of elements of largest variance over the tasks; a task's weight is its mean square among
    them; each element is the weighted mean of the tasks that have the elected sign. mergekit: topk=1 by default, and
    equal weights when the mean squares sum to less than 1e-6. One task alone varies nowhere: with topk < 1 nothing of
    it is kept.
    FuseChat 3.0's fusion: Wan et al. 2024, arXiv:2408.07990.
    """
    deltas = [f - base for f in tuned]
    mask = sparsify.variance(deltas, topk, ties)
    deltas = [d * mask for d in deltas]
    energy = [float(d.double().square().sum()) for d in deltas]
    weights = [e / (sum(energy) or 1.0) for e in energy]
    sign = elect(deltas, "total")
    agree = [(torch.sign(d) == sign).to(base.dtype) for d in deltas]
    total = weighted_sum([m * d for m, d in zip(agree, deltas, strict=True)], weights)
    share = weighted_sum(agree, weights)
    return base + scale * (total / torch.where(share == 0, 1.0, share))


@method("ram", needs_base=True, unit="element", paper="arXiv:2601.13572")
def ram(tuned: Sequence[Tensor], base: Tensor, *, epsilon: float = 1e-5, scale: float = 1.0) -> Tensor:
    """Mean of the task vectors that moved an element by more than `epsilon` (RAM).

    What one model alone changed is added whole, what several changed is averaged over them: made for updates of
    reinforcement learning, which leave most elements untouched. Reinforced Agent Merging, arXiv:2601.13572.
    """
    deltas, active, count = _active(tuned, base, epsilon)
    return base + scale * (weighted_sum([d * a for d, a in zip(deltas, active, strict=True)]) / count)


@method("ram_plus", needs_base=True, unit="tensor", paper="arXiv:2601.13572")
def ram_plus(
    tuned: Sequence[Tensor],
    base: Tensor,
    *,
    r: float = 0.1,
    alpha: float = 0.2,
    epsilon: float = 1e-5,
    scale: float = 1.0,
) -> Tensor:
    """RAM that strengthens what one model alone changed, to make up for what it loses where several did (RAM+).

    The unique elements of a model are multiplied by 1 + r * min(rho, alpha); rho is the number of its shared elements
    over the number of its unique ones, in this tensor. arXiv:2601.13572; mergekit's ramplus_tl.
    """
    deltas, active, count = _active(tuned, base, epsilon)
    total = torch.zeros_like(base)
    for d, a in zip(deltas, active, strict=True):
        unique = a & (count == 1)
        alone = int(unique.sum())
        rho = (int(a.sum()) - alone) / alone if alone else 0.0
        total = total + torch.where(unique, d * (1 + r * min(rho, alpha)), d * a / count)
    return base + scale * total


def _active(tuned: Sequence[Tensor], base: Tensor, epsilon: float) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Task vectors, where each exceeds epsilon, and by how many models each element is moved (at least 1)."""
    deltas = [f - base for f in tuned]
    active = [d.abs() > epsilon for d in deltas]
    return deltas, active, torch.stack(active).sum(dim=0).clamp_min(1).to(base.dtype)


@method("magmax", needs_base=True, unit="element", paper="arXiv:2407.06322")
def magmax(tuned: Sequence[Tensor], base: Tensor, *, scale: float = 1.0) -> Tensor:
    """Each element from the task vector in which it is largest in magnitude (MagMax); the later one among equals.

    The authors scale by 0.5 for eight tasks. Marczak et al. 2024, arXiv:2407.06322.
    """
    largest = tuned[0] - base
    for f in tuned[1:]:
        d = f - base
        largest = torch.where(d.abs() >= largest.abs(), d, largest)
    return base + scale * largest


class Unified(NamedTuple):
    """EMR's decomposition of one tensor of several task vectors: task i is about scales[i] * masks[i] * vector."""

    vector: Tensor
    """The unified task vector: elected sign, largest agreeing magnitude."""
    masks: list[Tensor]
    """Per task, where it has the elected sign (bool)."""
    scales: list[float]
    """Per task, the factor that gives its mean magnitude back; 0 where the task agrees with nothing."""


def unify(deltas: Sequence[Tensor]) -> Unified:
    """Elect, mask and rescale one tensor's task vectors. EMR-Merging, Huang et al. 2024, arXiv:2405.17461.

    As in the authors' code an exact tie elects the negative sign. Their scales are of the whole model, these are of
    the tensor: sum |d_i| / sum |masks[i] * vector|.
    """
    sign = torch.where(weighted_sum(deltas) > 0, 1.0, -1.0)
    masks = [d * sign > 0 for d in deltas]
    vector = sign * torch.stack([d.abs() * m for d, m in zip(deltas, masks, strict=True)]).amax(dim=0)
    old = [float(d.double().abs().sum()) for d in deltas]
    new = [float((vector * m).double().abs().sum()) for m in masks]
    return Unified(vector, masks, [a / b if b else 0.0 for a, b in zip(old, new, strict=True)])


@method("emr", needs_base=True, unit="element", paper="arXiv:2405.17461")
def emr(tuned: Sequence[Tensor], base: Tensor, *, scale: float = 1.0) -> Tensor:
    """Base plus EMR's unified task vector: in each element the elected sign and the largest magnitude that has it.

    The one model that all tasks share; `unify` also returns the masks and scales that turn it into each task's model.
    Huang et al. 2024, arXiv:2405.17461.
    """
    return base + scale * unify([f - base for f in tuned]).vector


def tall_masks(deltas: Sequence[Tensor], strictness: float = 0.4) -> list[Tensor]:
    """Where each task lives in the sum of all: |d_i| > strictness * |sum_j d_j - d_i|, a bool mask for each task.

    The paper's lambda, there chosen per task from 0.2 to 0.6 on held-out data. With one task everything that moved.
    TALL masks, Wang et al. 2024, arXiv:2405.07813, equation 3.
    """
    total = weighted_sum(deltas)
    return [d.abs() > strictness * (total - d).abs() for d in deltas]


@method("consensus", needs_base=True, unit="element", paper="arXiv:2405.07813")
def consensus(
    tuned: Sequence[Tensor], base: Tensor, *, strictness: float = 0.4, agreeing: int = 2, scale: float = 1.0
) -> Tensor:
    """Task arithmetic without the elements that serve fewer than `agreeing` tasks (Consensus TA).

    Which tasks an element serves is told by their TALL masks (see `tall_masks`). agreeing=2 drops what serves nobody or
    one task alone, 1 only what serves nobody, 0 nothing at all.
    Wang et al. 2024, arXiv:2405.07813, section 4.
    """
    deltas = [f - base for f in tuned]
    served = torch.stack(tall_masks(deltas, strictness)).sum(dim=0)
    return base + scale * (weighted_sum(deltas) * (served >= agreeing))


@method("nearswap", needs_base=True, unit="element", inputs=(1, 1))
def nearswap(tuned: Sequence[Tensor], base: Tensor, *, t: float) -> Tensor:
    """Goes from the base towards the tuned model by at most `t` in each element: B + clip(F - B, -t, t).

    Where the two are nearer than t that is the tuned value itself. The same as interpolating with
    w = min(1, t / |F - B|); mergekit's floor of 1e-6 under |F - B| (which matters when t is below it) is left out.
    Alchemonaut's QuartetAnemoi model card; mergekit.
    """
    if t < 0:
        raise SurgeryError(f"'t' of 'nearswap' is the largest change of an element, found {t}.", hint="Give t >= 0.")
    return base + (tuned[0] - base).clamp(-t, t)


@method("arcee_fusion", needs_base=True, unit="tensor", inputs=(1, 1))
def arcee_fusion(tuned: Sequence[Tensor], base: Tensor, *, spread: float = 1.5) -> Tensor:
    """Takes over only the outstanding changes: importance |d| * KL(softmax F || softmax B) of its row, in float64.

    Kept is what reaches median + spread * (upper - lower quartile) of the importances. The quantiles are exact, while
    mergekit draws a random million of larger tensors, and its float32 divergence is mostly rounding for small updates.
    Arcee Fusion, of mergekit.
    """
    d = tuned[0] - base
    if d.numel() == 0:
        return base.clone()
    p, q = (torch.softmax(x.double(), dim=-1) + 1e-8 for x in (tuned[0], base))
    importance = d.double().abs() * (p * (p / q).log()).sum(dim=-1, keepdim=True)
    lower, median, upper = (_quantile(importance, share) for share in (0.25, 0.5, 0.75))
    return base + d * (importance >= median + spread * (upper - lower))


def _quantile(x: Tensor, share: float) -> Tensor:
    """The element of rank floor(share * (n - 1)), counted from 0."""
    return x.reshape(-1).kthvalue(int(fraction(share, "share") * (x.numel() - 1)) + 1).values
