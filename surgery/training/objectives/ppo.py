"""PPO with a value head, as ReFT trains reasoning with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.training.advantages import generalised, whitened
from surgery.training.batch import Batch
from surgery.training.objectives.aggregate import sequence_mean
from surgery.training.objectives.base import Loss, Objective, register
from surgery.training.policy import Policy, Scores
from surgery.training.schedules import Number

if TYPE_CHECKING:
    from surgery.training.context import Context


class ValueHead(nn.Linear):
    """(..., d_model) -> (..., 1): what the completion will be rewarded with from here on. Begins at 0; never in half
    precision, whatever the model is in."""

    def __init__(self, d_model: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(d_model, 1, dtype=dtype)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Values of last hidden states."""
        with torch.autocast(states.device.type, enabled=False):
            return super().forward(states.to(self.weight.dtype))


@register("ppo")
@dataclass(frozen=True)
class PPO(Objective):
    """Clipped policy and value losses on whitened GAE (Schulman et al. 2017, arXiv:1707.06347), as in ReFT (Luong et
    al. 2024, arXiv:2401.08967): policy + `alpha` * value.

    Values, rewards and log-probabilities live on the positions that *predict* a token. A token is rewarded by
    -kl_coef (log pi_old - log pi_ref), the last one (the end mark, where there is one) by the completion's reward too.
    ReFT makes two passes over a batch: `batch: {epochs: 2}`; its kl_coef is 0.05 for language, 0.01 for programs.
    """

    gamma: float = 1.0
    lam: float = 0.95
    """GAE's lambda."""
    kl_coef: Number = 0.05
    """Weight of the reference in the reward; 0 never makes a reference."""
    clip: float = 0.2
    """Of the ratio to the old policy, around 1."""
    value_clip: float = 0.2
    """Of the value, around the old value."""
    alpha: Number = 5.0
    """Weight of the value loss."""

    @property
    def asks(self) -> dict[str, bool]:
        """Values."""
        return {"values": True}

    @property
    def uses_reference(self) -> bool:
        """Only for the KL in the reward."""
        return self.kl_coef != 0.0

    def check(self, settings: Mapping[str, Any]) -> None:
        """GAE's discounts are shares."""
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise SurgeryError(f"ppo: `{name}` is {getattr(self, name)}, expected a number from 0 to 1.")

    def modules(self, policy: Policy) -> dict[str, nn.Module]:
        """The value head."""
        config: Any = policy.model.config
        dtype = torch.float64 if next(policy.model.parameters()).dtype == torch.float64 else torch.float32
        return {"value": ValueHead(config.get_text_config().hidden_size, dtype)}

    def prepare(self, batch: Batch, context: Context) -> None:
        """Old log-probabilities and values; advantages and returns from the rewards. All of it once for all epochs."""
        old = context.scores(batch, values=True)
        batch["old_log_probs"], batch["old_values"] = old["log_probs"], old["values"]
        batch.mask = batch.mask * ~batch["reward"].isnan()[:, None]  # rows that no reward function scored
        rewards = terminal(batch["reward"].nan_to_num(0.0), batch.mask).to(old["values"].dtype)
        if self.uses_reference:
            difference = old["log_probs"] - context.reference_log_probs(batch)
            rewards = rewards - self.at(self.kl_coef, batch) * difference
            context.noted["kl"] = float((difference * batch.mask).sum() / batch.mask.sum().clamp(min=1))
        advantage, returns = generalised(rewards, old["values"], batch.mask, gamma=self.gamma, lam=self.lam)
        batch["advantage/ppo"], batch["returns"] = whitened(advantage, batch.mask), returns
        batch.columns.setdefault("advantage", batch["advantage/ppo"])
        context.noted["explained_variance"] = explained_variance(old["values"], returns, batch.mask)

    def of_scores(self, scores: Scores, batch: Batch) -> Loss:
        """Policy loss + alpha * value loss, each a mean over rows of means over tokens."""
        assert scores.values is not None
        advantage, returns, old = batch["advantage/ppo"], batch["returns"], batch["old_values"]
        ratio = (scores.log_probs - batch["old_log_probs"]).exp()
        bounded = ratio.clamp(1 - self.clip, 1 + self.clip)
        policy = sequence_mean(torch.maximum(-advantage * ratio, -advantage * bounded), batch)
        near = old + (scores.values - old).clamp(-self.value_clip, self.value_clip)
        value = sequence_mean(0.5 * torch.maximum((scores.values - returns) ** 2, (near - returns) ** 2), batch)
        rows, count = len(batch) / max(batch.total_rows, 1), float(batch.mask.sum())
        metrics = {
            "policy_loss": (policy.detach(), rows),
            "value_loss": (value.detach(), rows),
            "clipped": (((bounded - ratio) * advantage < 0).float().mul(batch.mask).sum(), count),
            "value": ((scores.values.detach() * batch.mask).sum(), count),
        }
        return Loss(policy + self.at(self.alpha, batch) * value, metrics)


def terminal(rewards: Tensor, mask: Tensor) -> Tensor:
    """(rows, completion) with each row's reward at its last masked token: the one that predicts the end."""
    steps = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = (mask > 0).long().mul(steps).argmax(1, keepdim=True)
    return torch.zeros(mask.shape, dtype=rewards.dtype).scatter(1, last, rewards[:, None]) * mask


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over masked tokens; 0 where returns don't vary."""
    there = mask > 0
    if there.sum() < 2 or not (spread := returns[there].var()) > 0:
        return 0.0
    return float(1 - (returns - values)[there].var() / spread)
