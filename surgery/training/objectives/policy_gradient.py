"""Policy gradients on groups of rollouts: GRPO and its relatives differ in advantage, ratio and aggregation alone.

With rho = exp(log pi - log pi_old) and A the advantage, a token's loss is
-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + beta * k3, where k3 = exp(ref - logp) - (ref - logp) - 1 >= 0
estimates KL(pi || pi_ref). In the first update made of a batch rho is 1: the loss then *is* about 0 while its gradient
is not; look at `grad_norm`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.training.advantages import ADVANTAGES
from surgery.training.batch import Batch
from surgery.training.objectives import aggregate
from surgery.training.objectives.base import Loss, Objective, register
from surgery.training.policy import Scores
from surgery.training.schedules import Number

if TYPE_CHECKING:
    from surgery.training.context import Context


@dataclass(frozen=True)
class PolicyGradient(Objective):
    """What all of them share; the defaults are GRPO's."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: Number = 0.0
    """Weight of the KL to the reference; 0 never makes a reference."""
    kl_unbiased: bool = False
    """Multiply k3 by the ratio (TRL 1.16's default; the papers don't)."""
    ratio: Literal["token", "sequence"] = "token"
    """One importance ratio a token, or the geometric mean over the row (GSPO)."""
    advantage: str = "group_normalised"
    entropy: Number = 0.0
    """Weight of an entropy bonus."""
    truncated: Literal["keep", "mask"] = "keep"
    """Rows that hit the length limit: as they are, or without loss (they still count in their group's mean)."""

    @property
    def asks(self) -> dict[str, bool]:
        """Entropy with gradient only where it is in the loss."""
        return {"entropy": self.entropy != 0.0}

    @property
    def uses_reference(self) -> bool:
        """Only with a KL weight."""
        return self.beta != 0.0

    def check(self, settings: Mapping[str, Any]) -> None:
        """A group of one has no mean to compare with; an advantage must exist."""
        ADVANTAGES.lookup(self.advantage)
        if self.advantage != "plain" and settings.get("group", 2) < 2:
            raise SurgeryError(
                f"A group of {settings['group']} rollout has nothing to be compared with: its advantage is undefined.",
                hint="Set rollouts.group to 2 or more, or advantage: plain.",
            )

    def prepare(self, batch: Batch, context: Context) -> None:
        """Advantages from rewards (unless the source gave them), and the reference's log-probabilities if wanted.

        They stand in a column of their name, so that the parts of a sum may differ in them; `advantage` is the source's
        or the first part's.
        """
        given = "advantage" in batch and not any(name.startswith("advantage/") for name in batch.columns)
        if not given:
            found = batch[f"advantage/{self.advantage}"] = ADVANTAGES.lookup(self.advantage)(
                batch["reward"], batch.group
            )
            batch.columns.setdefault("advantage", found)
        if self.truncated == "mask" and "truncated" in batch:
            batch.mask = batch.mask * ~batch["truncated"].bool()[:, None]
        if self.uses_reference:
            batch["ref_log_probs"] = context.reference_log_probs(batch)

    def of_scores(self, scores: Scores, batch: Batch) -> Loss:
        """The clipped surrogate plus KL, aggregated."""
        logp, mask = scores.log_probs, batch.mask
        own = f"advantage/{self.advantage}"
        advantage = batch[own if own in batch else "advantage"]
        advantage = advantage if advantage.dim() == 2 else advantage[:, None]
        log_ratio = logp - (batch["old_log_probs"] if "old_log_probs" in batch else logp.detach())
        if self.ratio == "sequence":
            log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1).clamp(min=1.0))[:, None]
        ratio = log_ratio.exp()
        losses = self.surrogate(ratio, advantage).expand_as(logp)
        count = float(mask.sum())
        metrics: dict[str, tuple[Tensor | float, float]] = {}
        if "old_log_probs" in batch:
            clipped = ((ratio < 1 - self.clip_low) & (advantage < 0)) | ((ratio > 1 + self.clip_high) & (advantage > 0))
            metrics["clipped"] = ((clipped * mask).sum(), count)
        if self.uses_reference:
            kl = k3(logp, batch["ref_log_probs"])
            losses = losses + self.at(self.beta, batch) * (kl * ratio if self.kl_unbiased else kl)
            metrics["kl"] = ((kl.detach() * mask).sum(), count)
        if scores.entropy is not None and self.entropy != 0.0:
            losses = losses - self.at(self.entropy, batch) * scores.entropy
            metrics["policy_entropy"] = ((scores.entropy.detach() * mask).sum(), count)
        return Loss(self.aggregate(losses, batch), metrics)

    def surrogate(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        """-min(rho A, clip(rho) A)."""
        return -torch.minimum(ratio * advantage, ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantage)

    def aggregate(self, losses: Tensor, batch: Batch) -> Tensor:
        """Mean over rows of the mean over tokens."""
        return aggregate.sequence_mean(losses, batch)


def k3(logp: Tensor, ref: Tensor) -> Tensor:
    """Schulman's estimator of KL(pi || ref), at least 0: exp(ref - logp) - (ref - logp) - 1."""
    difference = ref - logp
    return torch.expm1(difference) - difference


@register("grpo")
@dataclass(frozen=True)
class GRPO(PolicyGradient):
    """Group-relative policy optimisation (Shao et al. 2024, arXiv:2402.03300), with the paper's KL weight of 0.04."""

    beta: Number = 0.04


@register("bnpo")
@dataclass(frozen=True)
class BNPO(PolicyGradient):
    """Token losses averaged over the micro-batch (TRL's `bnpo`)."""

    def aggregate(self, losses: Tensor, batch: Batch) -> Tensor:
        """Mean over the micro-batch's tokens."""
        return aggregate.micro_batch_mean(losses, batch)


@register("dapo")
@dataclass(frozen=True)
class DAPO(PolicyGradient):
    """Clip-higher and a mean over all tokens of the update (Yu et al. 2025, arXiv:2503.14476).

    Its dynamic sampling is the source `dynamic`, its overlong penalty the reward `soft_overlong`.
    """

    clip_high: float = 0.28

    def aggregate(self, losses: Tensor, batch: Batch) -> Tensor:
        """Mean over the update's tokens."""
        return aggregate.token_mean(losses, batch)


@register("dr_grpo")
@dataclass(frozen=True)
class DrGRPO(PolicyGradient):
    """No division by the group's deviation nor by a row's length (Liu et al. 2025, arXiv:2503.20783).

    `length` is the constant divisor; by default the longest completion allowed.
    """

    advantage: str = "group_centred"
    length: int = 0

    def aggregate(self, losses: Tensor, batch: Batch) -> Tensor:
        """Sum over tokens / (rows * length)."""
        return aggregate.constant(losses, batch, self.length or batch.max_new_tokens)


@register("gspo")
@dataclass(frozen=True)
class GSPO(PolicyGradient):
    """One importance ratio a row: the geometric mean of its tokens' (Zheng et al. 2025, arXiv:2507.18071)."""

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    ratio: Literal["token", "sequence"] = "sequence"


@register("rloo")
@dataclass(frozen=True)
class RLOO(PolicyGradient):
    """REINFORCE with the mean of the group's others as baseline (Ahmadian et al. 2024, arXiv:2402.14740): no clip.

    A row's log-probability is the sum over its tokens, as in the paper; with infinite clips the surrogate is -rho A.
    """

    advantage: str = "leave_one_out"
    clip_low: float = math.inf
    clip_high: float = math.inf

    def aggregate(self, losses: Tensor, batch: Batch) -> Tensor:
        """Sum over tokens / rows."""
        return aggregate.constant(losses, batch, 1.0)


@register("reinforce_pp")
@dataclass(frozen=True)
class ReinforcePP(PolicyGradient):
    """REINFORCE++ with a group baseline: centred in the group, scaled by the batch (Hu 2025, arXiv:2501.03262)."""

    advantage: str = "batch_normalised"
