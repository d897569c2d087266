"""What sources, curricula and objectives may ask of the engine: rows, rollouts, log-probabilities, seeds.

Every process makes the same choices and holds the same batches; only the expensive parts (generation, rewards, passes
of the model) are shared out by rows, and put together again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.decoding import Generator, Rollout
from surgery.errors import SurgeryError
from surgery.models import encoded_prompts, pad_id
from surgery.training.batch import Batch, right_padded
from surgery.training.curriculum import Curriculum
from surgery.training.data import Row, demonstrations, pairs
from surgery.training.distributed import World
from surgery.training.policy import Policy
from surgery.training.recipe import Recipe
from surgery.training.rewards import Rewards, Scored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCORE_ROWS = 64
"""Rows of a pass without gradient."""


class Context:
    """The engine's face towards plug-ins. `iteration` counts draws; `step` counts optimizer steps."""

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        world: World,
        curricula: dict[str, Curriculum],
        rewards: Rewards | None,
        generator: Generator | None,
        reference: Policy | None,
    ) -> None:
        self.recipe, self.policy, self.tokenizer, self.world = recipe, policy, tokenizer, world
        self.curricula, self.rewards, self.reference = curricula, rewards, reference
        self._generator = generator
        config: Any = getattr(policy.model, "config", None)
        config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        self.room: int = getattr(config, "max_position_embeddings", None) or 0
        """Tokens that the model's context holds (0: it doesn't say)."""
        self.iteration = self.step = 0
        self.seconds: dict[str, float] = {}
        """Time since the last log line, by activity."""
        self.noted: dict[str, float] = {}
        """Numbers that a source wants in the next log line."""

    # ---- choices: the same on every process

    def seed(self, name: str, index: int = 0) -> int:
        """A 63-bit seed for a use, from (recipe seed, iteration, name, index)."""
        text = f"{self.recipe.seed}/{self.iteration}/{name}/{index}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

    def random(self, name: str) -> Random:
        """A generator for a use in this iteration."""
        return Random(self.seed(name))

    def rows(self, n: int, kind: str = "rollouts") -> list[Row]:
        """The curriculum's next `n` rows; `demonstrations` has data of its own where the recipe says so."""
        return self.curricula.get(kind, self.curricula["main"]).next(n)

    def encode(self, rows: Sequence[Row], kind: str = "demonstrations") -> Batch:
        """Rows as a batch of demonstrations or pairs."""
        make = pairs if kind == "pairs" else demonstrations
        batch = make(rows, self.tokenizer, chat=self.recipe.chat, max_length=self.recipe.batch.max_length)
        read = batch.prompt_mask.sum(1) + batch.lengths - 1  # the last token is only predicted
        if self.room and int(read.max()) > self.room:
            row = int(read.argmax())
            raise SurgeryError(
                f"A row of {int(read[row]) + 1} tokens, with prompt {str(batch.rows[row].get('prompt'))[:80]!r}, does "
                f"not fit into the model's context of {self.room}.",
                hint="Drop such rows, or cut them: batch.max_length.",
            )
        return batch

    # ---- work: shared out by rows, in the arithmetic of the updates (what a token's probability was must not differ)

    @property
    def autocast(self) -> torch.autocast:
        """The precision that the recipe names."""
        half = self.recipe.precision == "bfloat16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=half)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        group: int | None = None,
        *,
        name: str = "rollout",
    ) -> list[Rollout]:
        """`group` completions of each prompt (token ids), groups next to each other, by the current policy."""
        if self._generator is None:
            raise SurgeryError("This run draws no rollouts.")
        group = group or self.recipe.rollouts.group
        start = time.perf_counter()
        mine = self.world.share(range(len(prompts)))
        seeds = [self.seed(name, i) for i in mine]
        draw = self._generator
        with self.autocast:
            parts = self.world.together(lambda: draw([prompts[i] for i in mine], group, seeds) if mine else [])
        self._spent("generation", start)
        return [r for part in parts for r in part]

    def score(self, rows: Sequence[Row], rollouts: Sequence[Rollout], group: int = 1) -> Scored:
        """Rewards of rollouts whose rows are one a group (or one each)."""
        rewards = self.rewards
        if rewards is None:
            raise SurgeryError("This objective learns from rewards and the recipe has none.", hint="reward: accuracy")
        start = time.perf_counter()
        size = len(rollouts) // max(1, len(rows)) or 1
        everywhere = rewards.whole_batch  # it compares rows, or has a state: every process scores all
        mine = list(range(len(rows)) if everywhere else self.world.share(range(len(rows))))
        drawn = [rollouts[i * size + g] for i in mine for g in range(size)]
        parts = self.world.together(lambda: rewards.score([rows[i] for i in mine], drawn, step=self.step, group=group))
        parts = parts[:1] if everywhere else parts
        self._spent("reward", start)
        self.noted |= {f"reward/{name}": value for name, value in parts[0].metrics.items()}
        return Scored(
            [v for p in parts for v in p.total],
            {k: [v for p in parts for v in p.components[k]] for k in rewards.functions},
            {k: [v for p in parts for v in p.extra.get(k, ())] for k in parts[0].extra},
        )

    def rollouts(self, rows: Sequence[Row], group: int | None = None, *, name: str = "rollout") -> Batch:
        """Completions of the rows' prompts with their rewards: a batch of kind "rollouts"."""
        group = group or self.recipe.rollouts.group
        prompts = encoded_prompts(self.tokenizer, [row["prompt"] for row in rows], self.recipe.chat)
        found = self.generate(prompts, group, name=name)
        return self.batch_of(rows, found, group)

    def batch_of(self, rows: Sequence[Row], rollouts: Sequence[Rollout], group: int, **more: Any) -> Batch:
        """Rollouts as a batch with columns reward, reward/<component>, truncated and sampled_log_probs."""
        scored = self.score(rows, rollouts, group)
        sampling = self.recipe.rollouts
        logged = {k: v for k, v in scored.extra.items() if len(v) == len(rollouts)}
        spread = [
            {
                **rows[i // group],
                "completion_text": r.text,
                **({"logged": {k: v[i] for k, v in logged.items()}} if logged else {}),
            }
            for i, r in enumerate(rollouts)
        ]
        batch = Batch.of(
            [r.prompt_ids for r in rollouts],
            [r.completion_ids for r in rollouts],
            pad=pad_id(self.tokenizer),
            rows=spread,
            group=group,
            temperature=sampling.temperature or 1.0,
            max_new_tokens=sampling.max_new_tokens,
            **more,
        )
        batch["reward"] = numbers(scored.total)
        for component, values in scored.components.items():
            batch[f"reward/{component}"] = numbers(values)
        batch["truncated"] = torch.tensor([r.truncated for r in rollouts])
        batch["sampled_log_probs"] = right_padded([r.log_probs for r in rollouts], batch.mask.shape[1], 0.0)
        return batch

    def scores(self, batch: Batch, policy: Policy | None = None, **asks: bool) -> dict[str, Tensor]:
        """Log-probabilities (and what else is asked) of a batch without gradient, by the policy as it is now."""
        policy = policy or self.policy
        start = time.perf_counter()
        mine = batch.select(self.world.share(range(len(batch)), batch.group))
        found: list[dict[str, Tensor]] = []
        chunks = mine.chunks(self.recipe.batch.micro_batch or SCORE_ROWS) if len(mine) else []
        # sharded parameters are gathered by all at once: who has fewer rows goes through some again, for nothing
        rounds = max(self.world.gather(len(chunks))) if self.recipe.parallel == "fsdp2" else len(chunks)
        width = batch.completion_ids.shape[1]
        with torch.no_grad(), self.autocast:
            for i in range(rounds):
                chunk = chunks[i] if i < len(chunks) else batch.select(range(batch.group))
                scores = policy(chunk.to(self.world.device), **asks)
                part = {k: v for k, v in vars(scores).items() if v is not None and k != "hidden"}
                if i < len(chunks):
                    found.append({name: _widened(value.cpu(), width) for name, value in part.items()})
        self._spent("scoring", start)
        parts = [part for each in self.world.gather(found) for part in each]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def reference_log_probs(self, batch: Batch) -> Tensor:
        """(rows, completion) under the reference: the snapshot of the policy as it was given to the engine."""
        assert self.reference is not None, "an objective that uses the reference says so by `uses_reference`"
        return self.scores(batch, self.reference)["log_probs"]

    def _spent(self, what: str, start: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start


def numbers(values: Sequence[float | None]) -> Tensor:
    """(rows,) float64 with NaN where there is no value."""
    return torch.tensor([float("nan") if v is None else v for v in values], dtype=torch.float64)


def _widened(values: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))
