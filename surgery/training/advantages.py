"""From rewards to advantages: what multiplies a token's policy gradient. Pure functions on (rows,) tensors.

Rewards come as float64, rows of a group next to each other; a row that no reward function scored is NaN: it does not
count in its group's statistics and gets advantage 0. Where all rewards of a group are equal every advantage is exactly
0: rewards are shifted by one of them before anything is averaged, so that no rounding error is divided by a small
standard deviation.

| name | advantage | source |
|---|---|---|
| group_normalised | (R - mean_g) / (std_g + 1e-4), std unbiased | GRPO, arXiv:2402.03300 |
| group_centred | R - mean_g | Dr.GRPO, arXiv:2503.20783 |
| leave_one_out | R_i - mean of the others = G / (G - 1) * (R_i - mean_g) | RLOO, arXiv:2402.14740 |
| batch_normalised | (R - mean_g) / (std over the batch + 1e-4) | REINFORCE++ with a group baseline, arXiv:2501.03262 |
| plain | R | REINFORCE |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from surgery.registry import Registry

ADVANTAGES: Registry[Callable[[Tensor, int], Tensor]] = Registry("advantage")
EPSILON = 1e-4


def _centred(rewards: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(groups, group): rewards minus the mean of their group, 0 where unscored; which are scored; their number."""
    grouped = rewards.double().view(-1, group)
    scored = ~grouped.isnan()
    number = scored.sum(1, keepdim=True).clamp(min=1)
    first = grouped.gather(1, scored.float().argmax(1, keepdim=True))
    shifted = torch.where(scored, grouped - first, 0.0)
    return torch.where(scored, shifted - shifted.sum(1, keepdim=True) / number, 0.0), scored, number


def group_deviation(rewards: Tensor, group: int) -> Tensor:
    """(groups,) unbiased standard deviation of each group's scored rewards; exactly 0 where they are equal."""
    centred, _, number = _centred(rewards, group)
    return ((centred**2).sum(1) / (number[:, 0] - 1).clamp(min=1)).sqrt()


@ADVANTAGES.register("group_normalised")
def group_normalised(rewards: Tensor, group: int) -> Tensor:
    """(R - mean) / (std + 1e-4) inside each group (GRPO)."""
    centred, _, _ = _centred(rewards, group)
    return (centred / (group_deviation(rewards, group)[:, None] + EPSILON)).flatten().float()


@ADVANTAGES.register("group_centred")
def group_centred(rewards: Tensor, group: int) -> Tensor:
    """R - mean inside each group (Dr.GRPO)."""
    return _centred(rewards, group)[0].flatten().float()


@ADVANTAGES.register("leave_one_out")
def leave_one_out(rewards: Tensor, group: int) -> Tensor:
    """R minus the mean of the group's other rewards (RLOO)."""
    centred, _, number = _centred(rewards, group)
    return (centred * number / (number - 1).clamp(min=1)).flatten().float()


@ADVANTAGES.register("batch_normalised")
def batch_normalised(rewards: Tensor, group: int) -> Tensor:
    """R - mean of the group, over the standard deviation of that in the whole batch (REINFORCE++ baseline)."""
    centred, scored, _ = _centred(rewards, group)
    deviation = ((centred**2).sum() / (scored.sum() - 1).clamp(min=1)).sqrt()
    return (centred / (deviation + EPSILON)).flatten().float()


@ADVANTAGES.register("plain")
def plain(rewards: Tensor, group: int) -> Tensor:
    """The reward itself (REINFORCE without baseline)."""
    return rewards.nan_to_num(0.0).float()


def generalised(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """GAE over tokens (Schulman et al. 2015, arXiv:1506.02438): (advantages, returns), each (rows, completion).

    `rewards` and `values` (rows, completion) live on the positions that predict the tokens. Only those of `mask` count:
    others (a given prefix, a tool's output, padding) are stepped over, and after the last one the value is 0.
    """
    advantages, ahead, running = (
        torch.zeros_like(values),
        torch.zeros_like(values[:, 0]),
        torch.zeros_like(values[:, 0]),
    )
    for t in reversed(range(values.shape[1])):
        here = mask[:, t] > 0
        error = rewards[:, t] + gamma * ahead - values[:, t]
        running = torch.where(here, error + gamma * lam * running, running)
        ahead = torch.where(here, values[:, t], ahead)
        advantages[:, t] = running * here
    return advantages, (advantages + values) * mask


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit (unbiased) variance over the masked entries; 0 elsewhere, and everywhere if they are equal."""
    there = mask > 0
    values = torch.where(there, values - values[there][:1].sum(), 0.0)
    centred = torch.where(there, values - values.sum() / there.sum().clamp(min=1), 0.0)
    return centred * torch.rsqrt((centred**2).sum() / (there.sum() - 1).clamp(min=1) + 1e-8)
