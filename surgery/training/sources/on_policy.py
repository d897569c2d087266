"""Batches that the policy draws itself: plain, or only where there is something to learn."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.registry import nearest
from surgery.training.advantages import group_deviation
from surgery.training.batch import Batch
from surgery.training.data import Row
from surgery.training.signs import TrainingWarning
from surgery.training.sources.base import SOURCES, Source, Update, joined

if TYPE_CHECKING:
    from surgery.training.context import Context


@SOURCES.register("on_policy")
@dataclass
class OnPolicy(Source):
    """`rollouts.prompts` prompts, `rollouts.group` completions of each by the current policy."""

    gives: tuple[str, ...] = field(default=("rollouts",), init=False)

    def draw(self, context: Context) -> list[Update]:
        """Fresh rollouts with their rewards."""
        return [Update({"rollouts": context.rollouts(context.rows(context.recipe.rollouts.prompts))})]


@SOURCES.register("dynamic")
@dataclass
class Dynamic(OnPolicy):
    """Dynamic sampling: draws on until `rollouts.prompts` groups can teach something (DAPO, Yu et al. 2025,
    arXiv:2503.14476, equation 11).

    A group can when its mean of the reward `metric`, whose values are 0 and 1, is strictly between them; without
    `metric` that is accuracy if the recipe has that reward, else groups in which the rewards' sum differs. After
    `max_draws` batches of prompts it makes do with what is there; with nothing at all, the last batch has advantage 0.
    """

    metric: str = ""
    max_draws: int = 10

    def check(self, settings: Mapping[str, Any]) -> None:
        """The metric must be one of the rewards; a group of one never differs."""
        known_metric(self.metric, settings)
        if self.max_draws < 1:
            raise SurgeryError(f"Source 'dynamic': max_draws is {self.max_draws}; expected at least 1.")
        if settings["group"] < 2:
            raise SurgeryError("Source 'dynamic': a group of 1 never differs.", hint="Set rollouts.group to 2 or more.")

    def draw(self, context: Context) -> list[Update]:
        """`rollouts.prompts` groups that differ, of at most `max_draws` times as many."""
        wanted, kept, found = context.recipe.rollouts.prompts, list[Batch](), 0
        for draw in range(self.max_draws):
            batch = context.rollouts(context.rows(wanted), name=f"rollout/{draw}" if draw else "rollout")
            groups = self._teaches(batch).nonzero()[: wanted - found, 0].tolist()
            found += len(groups)
            if groups:
                kept.append(batch.select([g * batch.group + i for g in groups for i in range(batch.group)]))
            if found == wanted:
                break
        context.noted |= {"dynamic/draws": draw + 1.0, "dynamic/shortfall": float(wanted - found)}
        if not kept:
            batch["advantage"] = torch.zeros(len(batch))
            return [Update({"rollouts": batch})]
        return [Update({"rollouts": joined(kept)})]

    def _teaches(self, batch: Batch) -> Tensor:
        """(groups,) whether there is something to learn."""
        metric = self.metric or "accuracy"
        if f"reward/{metric}" not in batch:
            return group_deviation(batch["reward"], batch.group) > 0
        mean = means(batch, metric)
        return (mean > 0) & (mean < 1)


@SOURCES.register("pass_rate_band")
@dataclass
class PassRateBand(OnPolicy):
    """Only prompts that the model of the start solves sometimes: pass rate within [low, high].

    Before the first step, `pool` prompts are tried `rollouts.group` times each; those outside are left out for good,
    those inside are shuffled again and again. A `low` just above 0 drops what is hopeless (the filter of RIF), a `high`
    below 1 what is known. `metric` is one of the rewards, by default their sum. The share that stays is logged.
    """

    pool: int = 256
    low: float = 0.01
    high: float = 0.99
    metric: str = ""

    def __post_init__(self) -> None:
        self.kept: list[Row] = []
        self.cursor = 0

    def check(self, settings: Mapping[str, Any]) -> None:
        """A known metric and a band that is one."""
        known_metric(self.metric, settings)
        if not self.low <= self.high or self.pool < 1:
            raise SurgeryError(
                f"Source 'pass_rate_band': pool {self.pool}, low {self.low} and high {self.high}; "
                "expected at least one prompt and low <= high."
            )

    def draw(self, context: Context) -> list[Update]:
        """Fresh rollouts of prompts inside the band."""
        if not self.kept:
            self._measure(context)
        rows = [self._row(context.recipe.seed, self.cursor + i) for i in range(context.recipe.rollouts.prompts)]
        self.cursor += len(rows)
        return [Update({"rollouts": context.rollouts(rows)})]

    def _measure(self, context: Context) -> None:
        rows = context.rows(self.pool)
        rate = means(context.rollouts(rows, name="band"), self.metric)
        self.kept = [row for row, r in zip(rows, rate.tolist(), strict=True) if self.low <= r <= self.high]
        context.noted["band/kept"] = len(self.kept) / len(rows)
        if not self.kept:
            warnings.warn(
                f"None of {self.pool} prompts has a pass rate within [{self.low}, {self.high}] (they are from "
                f"{float(rate.min()):.2f} to {float(rate.max()):.2f}): all are kept.",
                TrainingWarning,
                stacklevel=2,
            )
            self.kept = rows

    def _row(self, seed: int, at: int) -> Row:
        epoch, at = divmod(at, len(self.kept))
        return dict(Random(f"{seed}/band/{epoch}").sample(self.kept, len(self.kept))[at])

    def state_dict(self) -> dict[str, Any]:
        """The rows inside the band and the cursor."""
        return {"kept": self.kept, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The same."""
        self.kept, self.cursor = state["kept"], state["cursor"]


def means(batch: Batch, metric: str = "") -> Tensor:
    """(groups,) mean of a reward (of the sum, without a name) over each group's scored rollouts; NaN without any."""
    return batch[f"reward/{metric}" if metric else "reward"].view(-1, batch.group).nanmean(1)


def known_metric(metric: str, settings: Mapping[str, Any]) -> None:
    """Raises `SurgeryError` when the recipe has no reward of that name."""
    names = settings.get("components")
    if metric and names is not None and metric not in names:
        problem = f"The recipe has no reward '{metric}', which the source looks at."
        raise SurgeryError(problem, hint=nearest(metric, names))
