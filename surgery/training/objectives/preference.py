"""Preferences: a chosen and a rejected completion of one prompt, next to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from surgery.errors import SurgeryError
from surgery.training.batch import Batch
from surgery.training.objectives.aggregate import row_sums, sequence_mean
from surgery.training.objectives.base import Loss, Objective, register
from surgery.training.policy import Scores
from surgery.training.schedules import Number

if TYPE_CHECKING:
    from surgery.training.context import Context


@dataclass(frozen=True)
class Preference(Objective):
    """What they share: batches of pairs, micro-batches of whole pairs, means over the update's pairs."""

    whole_groups = True

    @property
    def kind(self) -> str:
        """Pairs."""
        return "pairs"


def sides(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(pairs,) of the chosen, and of the rejected, from (rows,)."""
    return rows[::2], rows[1::2]


def pair_mean(losses: Tensor, batch: Batch) -> Tensor:
    """Sum over pairs / pairs of the whole update."""
    return losses.sum() / max(batch.total_rows / 2, 1.0)


@register("dpo")
@dataclass(frozen=True)
class DPO(Preference):
    """-log sigmoid(beta ((log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected))), sums over tokens
    (Rafailov et al. 2023, arXiv:2305.18290). At pi = pi_ref it is ln 2.

    With `rationale` gamma > 0, rows have a column `rationale` that says why the chosen one is better, and gamma times
    -log p(rationale | prompt, chosen, rejected), a mean over its tokens, is added (Just et al. 2024, arXiv:2407.14477).
    """

    beta: Number = 0.1
    rationale: Number = 0.0
    template: str = "{prompt}\nBetter: {chosen}\nWorse: {rejected}\nWhy: "
    """What the rationale completes; of a chat, the last message."""

    @property
    def uses_reference(self) -> bool:
        """Always."""
        return True

    def check(self, settings: Mapping[str, Any]) -> None:
        """Rationales come from the data."""
        columns = settings.get("columns")
        if self.rationale != 0.0 and columns is not None and "rationale" not in columns:
            raise SurgeryError(
                "DPO with a rationale weight needs a column 'rationale' in the data.",
                hint=f"Columns: {', '.join(sorted(columns))}.",
            )

    def prepare(self, batch: Batch, context: Context) -> None:
        """The reference's log-probabilities, and the rationales as tokens (kept with the rows)."""
        batch["ref_log_probs"] = context.reference_log_probs(batch)
        if self.rationale != 0.0:
            told = context.encode([self._told(row) for row in batch.rows[::2]], "demonstrations")
            for i, row in enumerate(batch.rows[::2]):
                row["rationale_prompt_ids"] = told.prompt_ids[i][told.prompt_mask[i]].tolist()
                row["rationale_ids"] = told.completion_ids[i, : told.lengths[i]].tolist()

    def loss(self, policy: Callable[..., Scores], batch: Batch) -> Loss:
        """The pairs' loss, plus that of their rationales."""
        found = super().loss(policy, batch)
        if self.rationale == 0.0:
            return found
        rows = batch.rows[::2]
        told = Batch.of([r["rationale_prompt_ids"] for r in rows], [r["rationale_ids"] for r in rows])
        told = told.to(batch.completion_ids.device)
        told.total_rows = max(1, batch.total_rows // 2)
        nll = -policy(told).log_probs
        value = found.value + self.at(self.rationale, batch) * sequence_mean(nll, told)
        metrics = {"rationale_nll": ((nll.detach() * told.mask).sum(), float(told.mask.sum()))}
        return Loss(value, {**found.metrics, **metrics})

    def of_scores(self, scores: Scores, batch: Batch) -> Loss:
        """Of the pairs alone."""
        chosen, rejected = sides(row_sums(scores.log_probs - batch["ref_log_probs"], batch))
        margin = self.at(self.beta, batch) * (chosen - rejected)
        pairs = float(len(margin))
        metrics: dict[str, tuple[Tensor | float, float]] = {
            "pair_accuracy": ((margin > 0).sum(), pairs),
            "margin": (margin.detach().sum(), pairs),
            "chosen_log_ratio": (chosen.detach().sum(), pairs),
            "rejected_log_ratio": (rejected.detach().sum(), pairs),
        }
        return Loss(pair_mean(-logsigmoid(margin), batch), metrics)

    def _told(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row as a demonstration of its rationale."""
        prompt: Any = row["prompt"]
        last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        text = self.template.format(prompt=last, chosen=row["chosen"], rejected=row["rejected"])
        asked = text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]
        return {"prompt": asked, "completion": row["rationale"]}


@register("orpo")
@dataclass(frozen=True)
class ORPO(Preference):
    """-s(chosen) - lam log sigmoid(lo(chosen) - lo(rejected)), with s the mean log-probability of a row's tokens and
    lo = log(e^s / (1 - e^s)) its log-odds (Hong et al. 2024, arXiv:2403.07691). No reference.
    """

    lam: Number = 0.1
    """The paper's lambda."""

    def of_scores(self, scores: Scores, batch: Batch) -> Loss:
        """Likelihood of the chosen and odds ratio of the two, each a mean over pairs."""
        chosen, rejected = sides(row_sums(scores.log_probs, batch) / batch.mask.sum(1).clamp(min=1.0))
        ratio = log_odds(chosen) - log_odds(rejected)
        losses = -chosen - self.at(self.lam, batch) * logsigmoid(ratio)
        pairs = float(len(ratio))
        metrics: dict[str, tuple[Tensor | float, float]] = {
            "pair_accuracy": ((ratio > 0).sum(), pairs),
            "log_odds_ratio": (ratio.detach().sum(), pairs),
            "chosen_nll": (-chosen.detach().sum(), pairs),
        }
        return Loss(pair_mean(losses, batch), metrics)


def log_odds(log_prob: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p; p is kept 1e-7 below 1, where the odds would be infinite."""
    log_prob = log_prob.clamp(max=-1e-7)
    return log_prob - torch.log(-torch.expm1(log_prob))
