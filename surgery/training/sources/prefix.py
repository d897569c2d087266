"""Rollouts that begin with a piece of a demonstration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.decoding import Rollout
from surgery.errors import SurgeryError
from surgery.models import encoded_prompts
from surgery.training import schedules
from surgery.training.batch import Batch
from surgery.training.data import Row, completion_ids
from surgery.training.schedules import Cosine, Number
from surgery.training.sources.base import SOURCES, Source, Update

if TYPE_CHECKING:
    from surgery.training.context import Context


@SOURCES.register("prefix")
@dataclass
class Prefix(Source):
    """Prefix sampling: in each group the last rollout continues the first floor(u |y*|) tokens of the demonstration y*,
    u ~ U[low, high] (Prefix-RFT, Huang et al. 2025, arXiv:2507.01679).

    `low` falls along a cosine, so that the policy is on its own more and more. Of the prefix only the `share` of tokens
    at which the policy's entropy is highest get a gradient, and log-probabilities of the policy at rollout time. At
    least one token is sampled. With `high` 0, or `low` and `high` so small that no prefix has a token, rollouts are
    exactly those of `on_policy`. Rows whose `completion` is empty or null get no prefix. The prompt, the prefix and
    `rollouts.max_new_tokens` must fit into the model's context; prefix and continuation together are cut at
    `rollouts.max_new_tokens`.
    """

    low: Number = field(default_factory=lambda: Cosine(0.95, 0.05))
    high: Number = 0.95
    share: float = 0.2
    gives: tuple[str, ...] = field(default=("rollouts",), init=False)

    def __post_init__(self) -> None:
        self.low, self.high = schedules.parse(self.low), schedules.parse(self.high)
        if not 0 <= self.share <= 1:
            raise SurgeryError(f"Source 'prefix': share is {self.share}; expected between 0 and 1.")

    def columns(self) -> tuple[str, ...]:
        """Prompts and demonstrations."""
        return ("prompt", "completion")

    def check(self, settings: Mapping[str, Any]) -> None:
        """One rollout without a prefix is needed beside the one that has it."""
        if settings["group"] < 2:
            raise SurgeryError("Source 'prefix' needs groups of 2 or more.", hint="Set rollouts.group.")

    def draw(self, context: Context) -> list[Update]:
        """G - 1 rollouts of each prompt and one that begins like its demonstration."""
        recipe = context.recipe
        rows, group = context.rows(recipe.rollouts.prompts), recipe.rollouts.group
        prefixes = self._prefixes(rows, context)
        context.noted["prefix/tokens"] = sum(map(len, prefixes)) / len(prefixes)
        if not any(prefixes):
            return [Update({"rollouts": context.rollouts(rows)})]
        prompts = encoded_prompts(context.tokenizer, [row["prompt"] for row in rows], recipe.chat)
        plain = context.generate(prompts, group - 1)
        begun = context.generate([[*p, *y] for p, y in zip(prompts, prefixes, strict=True)], 1, name="prefix")
        rollouts = []
        for i, (prefix, rollout) in enumerate(zip(prefixes, begun, strict=True)):
            rollouts += plain[i * (group - 1) : (i + 1) * (group - 1)]
            rollouts.append(self._whole(rollout, plain[i * (group - 1)].prompt_ids, prefix, context))
        batch = context.batch_of(rows, rollouts, group)
        self._teach(batch, prefixes, context)
        return [Update({"rollouts": batch})]

    def _prefixes(self, rows: Sequence[Row], context: Context) -> list[list[int]]:
        """The first tokens of each demonstration, never its end mark nor as many as a rollout may have."""
        random, (step, steps) = context.random("prefix"), (context.step, context.recipe.steps)
        low, high = schedules.value(self.low, step, steps), schedules.value(self.high, step, steps)
        found = []
        for row in rows:
            u = random.uniform(min(low, high), high)
            ids = completion_ids(context.tokenizer, row["completion"])[:-1] if row.get("completion") else []
            found.append(ids[: min(math.floor(u * len(ids)), context.recipe.rollouts.max_new_tokens - 1)])
        return found

    def _whole(self, rollout: Rollout, prompt: list[int], prefix: list[int], context: Context) -> Rollout:
        """The continuation with its prefix as one completion; log-probabilities of the prefix are filled in later."""
        most = context.recipe.rollouts.max_new_tokens

        def text(ids: list[int]) -> str:
            return str(context.tokenizer.decode(ids, skip_special_tokens=True))

        ids = [*prefix, *rollout.completion_ids]
        stopped = len(text(rollout.completion_ids)) - len(rollout.text)
        whole = text(ids[:most]) if len(ids) > most else text(ids)[: len(text(ids)) - stopped]
        log_probs = [0.0] * len(prefix) + list(rollout.log_probs)
        return replace(
            rollout,
            prompt_ids=prompt,
            completion_ids=ids[:most],
            log_probs=log_probs[:most],
            truncated=rollout.truncated or len(ids) > most,
            text=whole,
        )

    def _teach(self, batch: Batch, prefixes: Sequence[Sequence[int]], context: Context) -> None:
        """Masks all but the most uncertain prefix tokens, and writes down their log-probabilities."""
        last = torch.arange(batch.group - 1, len(batch), batch.group)
        hybrid = batch.select(last)
        scores = context.scores(hybrid, entropy=True)
        width = hybrid.completion_ids.shape[1]
        lengths = torch.tensor([len(prefix) for prefix in prefixes])
        forced = torch.arange(width) < lengths[:, None]
        kept = uncertain(scores["entropy"], lengths, self.share)
        batch.mask[last, :width] *= (~forced | kept).float()
        sampled = batch["sampled_log_probs"]
        sampled[last, :width] = torch.where(forced, scores["log_probs"].float(), sampled[last, :width])
        batch.total_tokens = float(batch.mask.sum())


def uncertain(entropy: Tensor, lengths: Tensor, share: float) -> Tensor:
    """(rows, tokens) True on the ceil(share * length) first tokens of highest entropy among each row's `lengths`."""
    forced = torch.arange(entropy.shape[1]) < lengths[:, None]
    order = entropy.masked_fill(~forced, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(entropy.shape[1]).expand_as(order))
    return forced & (rank < torch.ceil(share * lengths - 1e-9)[:, None])
