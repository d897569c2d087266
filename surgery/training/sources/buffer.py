"""Rollouts, and demonstrations of what they all failed at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError
from surgery.training.batch import Batch
from surgery.training.data import Row
from surgery.training.sources.base import SOURCES, Source, Update
from surgery.training.sources.on_policy import known_metric

if TYPE_CHECKING:
    from surgery.training.context import Context


@SOURCES.register("relift")
@dataclass
class ReLIFT(Source):
    """Reinforcement learning interleaved with fine-tuning on the hardest prompts (Ma et al. 2025, arXiv:2506.07527).

    A prompt at which all rollouts of its group failed (reward `metric`, by default the sum, at most `fail`) goes into a
    buffer with its demonstration, newest first. Once the buffer holds `size`, as many of the newest leave it for one
    imitation step, whose optimizer state is its own. Prompts without demonstration (`completion` empty or null) never
    enter. With `format`, a reward that is 0 or less where the form is wrong, groups in which every form is wrong are
    counted apart and stay out.
    """

    size: int = 128
    metric: str = ""
    fail: float = 0.0
    format: str = ""
    gives: tuple[str, ...] = field(default=("rollouts", "demonstrations"), init=False)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise SurgeryError(f"Source 'relift': size is {self.size}; expected at least 1.")
        self.buffer: list[Row] = []

    def check(self, settings: Mapping[str, Any]) -> None:
        """Metrics must be rewards of the recipe."""
        known_metric(self.metric, settings)
        known_metric(self.format, settings)

    def draw(self, context: Context) -> list[Update]:
        """Rollouts, and an imitation step when enough has failed."""
        rows = context.rows(context.recipe.rollouts.prompts)
        batch = context.rollouts(rows)
        self._remember(rows, batch, context)
        updates = [Update({"rollouts": batch})]
        if len(self.buffer) >= self.size:
            hardest, self.buffer = self.buffer[: self.size], self.buffer[self.size :]
            updates.append(Update({"demonstrations": context.encode(hardest)}, optimizer="imitation"))
        context.noted["relift/buffer"] = float(len(self.buffer))
        return updates

    def _remember(self, rows: list[Row], batch: Batch, context: Context) -> None:
        def all_failed(column: str, limit: float) -> list[bool]:
            values = batch[column].view(-1, batch.group)
            return ((values <= limit) | values.isnan()).all(1).logical_and(~values.isnan().all(1)).tolist()

        failed = all_failed(f"reward/{self.metric}" if self.metric else "reward", self.fail)
        formless = all_failed(f"reward/{self.format}", 0.0) if self.format else [False] * len(rows)
        hard = [row for row, f, form in zip(rows, failed, formless, strict=True) if f and not form]
        self.buffer = [row for row in reversed(hard) if row.get("completion")] + self.buffer
        context.noted |= {"relift/failed": len(hard) / len(rows), "relift/formless": sum(formless) / len(rows)}

    def state_dict(self) -> dict[str, Any]:
        """The buffer."""
        return {"buffer": self.buffer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The buffer."""
        self.buffer = state["buffer"]
