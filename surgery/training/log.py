"""What a run says: JSONL always, warnings that name the cause, the picture of the curves at the end."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, TextIO

import torch

from surgery.training.advantages import group_deviation
from surgery.training.batch import Batch
from surgery.training.distributed import World
from surgery.training.recipe import Recipe

FILES = ("metrics.jsonl", "rollouts.jsonl")


class Log:
    """metrics.jsonl (a line a step) and rollouts.jsonl (a line a rollout) in the run's folder; nothing without one."""

    def __init__(self, folder: Path | None, recipe: Recipe, world: World) -> None:
        self.folder, self.recipe, self.world = folder, recipe, world
        self.files: dict[str, TextIO] = {}

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """One line of numbers."""
        self._write("metrics.jsonl", {"step": step, **metrics})

    def rollouts(self, step: int, batch: Batch) -> None:
        """One line a rollout: texts, ids, rewards by component, advantage."""
        if self.folder is None:
            return
        components = {k.removeprefix("reward/"): v for k, v in batch.columns.items() if k.startswith("reward/")}
        for i, row in enumerate(batch.rows):
            length = int(batch.lengths[i])
            advantage = batch["advantage"][i] if "advantage" in batch else None
            self._write(
                "rollouts.jsonl",
                {
                    "step": step,
                    "group": i // batch.group,
                    "prompt": row.get("prompt"),
                    "completion": row.get("completion_text", ""),
                    "completion_ids": batch.completion_ids[i, :length].tolist(),
                    "reward": _plain(batch["reward"][i]),
                    "rewards": {k: _plain(v[i]) for k, v in components.items()},
                    "advantage": None if advantage is None or advantage.dim() else _plain(advantage),
                    "truncated": bool(batch["truncated"][i]),
                    "length": length,
                },
            )

    def warn(self, text: str) -> None:
        """A remark for whoever watches."""
        if self.world.main:
            warnings.warn(text, stacklevel=2)

    def position(self) -> dict[str, int]:
        """Bytes written so far."""
        if self.folder is None:
            return {}
        for file in self.files.values():
            file.flush()
        return {name: (self.folder / name).stat().st_size for name in FILES if (self.folder / name).exists()}

    def truncate(self, position: dict[str, int]) -> None:
        """Forgets what came after a checkpoint."""
        for name in FILES if self.folder is not None else ():
            assert self.folder is not None
            if (self.folder / name).exists():
                with (self.folder / name).open("r+b") as file:
                    file.truncate(position.get(name, 0))

    def _write(self, name: str, line: dict[str, Any]) -> None:
        if self.folder is None:
            return
        if name not in self.files:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.files[name] = (self.folder / name).open("a", encoding="utf-8")
        self.files[name].write(json.dumps(line, ensure_ascii=False) + "\n")
        self.files[name].flush()


def rollout_metrics(batch: Batch) -> dict[str, float]:
    """Numbers about a batch of rollouts: rewards, lengths, entropy, truncated share, groups without variance.

    `entropy` is the mean of -log p of the sampled tokens: an unbiased estimate, nats a token.
    """
    found: dict[str, float] = {}
    for name, values in batch.columns.items():
        if name == "reward" or name.startswith("reward/"):
            found[name] = float(values.nanmean())
    found["length"] = float(batch.lengths.float().mean())
    found["truncated"] = float(batch["truncated"].float().mean())
    found["zero_variance"] = float((group_deviation(batch["reward"], batch.group) == 0).float().mean())
    if "advantage" in batch:
        found["abs_advantage"] = float(batch["advantage"].abs().mean())
    there = batch.attended
    found["entropy"] = float(-(batch["sampled_log_probs"] * there).sum() / there.sum().clamp(min=1))
    return found


def _plain(value: torch.Tensor) -> float | None:
    number = float(value)
    return None if number != number else number
