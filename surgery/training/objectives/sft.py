"""Supervised fine-tuning: the likelihood of demonstrations."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.training.batch import Batch
from surgery.training.objectives.aggregate import sequence_mean, token_mean
from surgery.training.objectives.base import Loss, Objective, register
from surgery.training.policy import Scores


@register("sft")
@dataclass(frozen=True)
class SFT(Objective):
    """Cross-entropy of the completion (prompt tokens do not count), per token of the whole update.

    Rows with a `weight` (reward-weighted regression, signed likelihood terms) have it multiplied in. `per_row` takes
    the mean over rows of each row's mean instead.
    """

    per_row: bool = False

    @property
    def kind(self) -> str:
        """Demonstrations."""
        return "demonstrations"

    def of_scores(self, scores: Scores, batch: Batch) -> Loss:
        """-log p(token), aggregated."""
        losses = -scores.log_probs
        metrics = {"nll": ((losses.detach() * batch.mask).sum(), float(batch.mask.sum()))}
        if "weight" in batch:
            losses = losses * batch["weight"][:, None]
        return Loss(sequence_mean(losses, batch) if self.per_row else token_mean(losses, batch), metrics)
