"""What a run writes: metrics.jsonl and rollouts.jsonl always, trackers when the recipe asks, warnings by `signs.py`."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from surgery.errors import SurgeryError
from surgery.registry import nearest
from surgery.training.advantages import group_deviation
from surgery.training.batch import Batch
from surgery.training.distributed import World
from surgery.training.recipe import Recipe, as_words
from surgery.training.signs import TrainingWarning, Watch

FILES = ("metrics.jsonl", "rollouts.jsonl")
ENCODE = json.JSONEncoder(ensure_ascii=False).encode
"""One encoder for all lines: `json.dumps` with options makes a new one each time."""

TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    **{name: (name,) for name in ("wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab")},
}
"""Trackers that accelerate knows, and the packages of which each needs one."""


class Log:
    """metrics.jsonl (a line a step) and rollouts.jsonl (a line a rollout) in the run's folder; nothing without one.

    A step's lines reach the disk together when the step is over.
    """

    def __init__(self, folder: Path | None, recipe: Recipe, world: World) -> None:
        self.folder, self.recipe, self.world = folder, recipe, world
        self.files: dict[str, TextIO] = {}
        self.watch = Watch(recipe)
        self.groups = (0, 0)
        """A step, and how many groups of its rollouts are written."""

    def __enter__(self) -> Log:
        if self.recipe.trackers:
            self.world.accelerator.init_trackers(
                "surgery", _flat(as_words(self.recipe)), {"wandb": {"name": self.recipe.name}}
            )
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()
        # Not `end_training`, which would also end the process group that others in this process may go on using.
        for tracker in self.world.accelerator.trackers if self.recipe.trackers and self.world.main else ():
            tracker.finish()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """One line of numbers (null where there is none), to the file and to the trackers; and what they warn of."""
        self._write("metrics.jsonl", [{"step": step, **{name: finite(value) for name, value in metrics.items()}}])
        for file in self.files.values():
            file.flush()
        if self.recipe.trackers:
            self.world.accelerator.log({k: v for k, v in metrics.items() if math.isfinite(v)}, step=step)
        for text in self.watch.see(step, metrics):
            self.warn(text)

    def rollouts(self, step: int, batch: Batch) -> None:
        """One line a rollout: texts, ids, rewards by component, advantage."""
        if self.folder is None:
            return
        before = self.groups[1] if self.groups[0] == step else 0
        self.groups = step, before + len(batch) // batch.group
        rewards = {k.removeprefix("reward/"): v.tolist() for k, v in batch.columns.items() if k.startswith("reward/")}
        totals, cut, lengths = batch["reward"].tolist(), batch["truncated"].tolist(), batch.lengths.tolist()
        each = batch.columns.get("advantage")
        advantages = each.tolist() if each is not None and each.dim() == 1 else [None] * len(batch)
        ids = batch.completion_ids.tolist()
        self._write(
            "rollouts.jsonl",
            [
                {
                    "step": step,
                    "group": before + i // batch.group,
                    "prompt": row.get("prompt"),
                    "completion": row.get("completion_text", ""),
                    "completion_ids": ids[i][: lengths[i]],
                    "reward": finite(totals[i]),
                    "rewards": {name: finite(values[i]) for name, values in rewards.items()},
                    "advantage": finite(advantages[i]),
                    "truncated": bool(cut[i]),
                    "length": lengths[i],
                }
                for i, row in enumerate(batch.rows)
            ],
        )

    def warn(self, text: str) -> None:
        """A remark for whoever watches."""
        if self.world.main:
            warnings.warn(text, TrainingWarning, stacklevel=2)

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
                with (self.folder / name).open("r+b") as file:  # a power cut may have left less than was written
                    file.truncate(min(position.get(name, 0), (self.folder / name).stat().st_size))

    def _write(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        if self.folder is None:
            return
        if name not in self.files:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.files[name] = (self.folder / name).open("a", encoding="utf-8", buffering=1 << 20)
        self.files[name].write("".join(ENCODE(line) + "\n" for line in lines))


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


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl; NaN where a step had no number. A half-written last line is passed over.

    Raises `SurgeryError` when there is no such file.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise SurgeryError(f"{folder} is no folder of a run: it has no metrics.jsonl.")
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline is no whole line
    return [{k: math.nan if v is None else v for k, v in json.loads(line).items()} for line in lines]


def check_trackers(names: Sequence[str], out: Any) -> None:
    """Raises `SurgeryError` for a tracker that is unknown, not installed, or without a folder that it needs."""
    for name in names:
        if name not in TRACKERS:
            raise SurgeryError(f"There is no tracker '{name}'.", hint=nearest(name, TRACKERS))
        if not any(find_spec(package) for package in TRACKERS[name]):
            raise SurgeryError(
                f"The tracker {name} needs the package {TRACKERS[name][0]}, which is not installed.",
                hint=f"pip install {TRACKERS[name][0]}, or leave it out: metrics.jsonl is written anyway.",
            )
        if name == "tensorboard" and out is None:
            raise SurgeryError("The tracker tensorboard writes into the run's folder, and this run has none.")


def finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity: None."""
    return value if value is not None and math.isfinite(value) else None


def _flat(words: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """{"a": {"b": 1}} -> {"a.b": 1}: trackers keep one level of plain values."""
    found: dict[str, str | int | float | bool] = {}
    for name, value in words.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[prefix + name] = value if isinstance(value, str | int | float | bool) else str(value)
    return found
