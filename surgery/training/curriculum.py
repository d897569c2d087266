"""Which rows come next. A curriculum's choice is a function of (seed, iteration) and of what it was told so far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from surgery.registry import Registry
from surgery.training.batch import Batch
from surgery.training.data import Row, Rows


class Curriculum(Protocol):
    """Decides which rows come next, and may learn from what became of them."""

    def start(self, rows: Rows, seed: int) -> None:
        """Called once, before anything else."""

    def next(self, n: int) -> list[Row]:
        """The next `n` rows."""

    def update(self, batch: Batch) -> None:
        """Told every batch of rollouts once its rewards and advantages are known."""

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs, as plain JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` was made."""


CURRICULA: Registry[Any] = Registry("curriculum")


@CURRICULA.register("shuffled")
@dataclass
class Shuffled:
    """Every row once an epoch, in an order drawn from (seed, epoch); generated data in the order of their stream."""

    def start(self, rows: Rows, seed: int) -> None:
        """From the first row."""
        self.rows, self.seed, self.cursor = rows, seed, 0
        self._epoch, self._order = -1, [0]

    def next(self, n: int) -> list[Row]:
        """The next `n`; an epoch's end falls anywhere."""
        found = [self.rows.row(self._index(self.cursor + i)) for i in range(n)]
        self.cursor += n
        return found

    def _index(self, at: int) -> int:
        if self.rows.size == math.inf:
            return at
        epoch, at = divmod(at, int(self.rows.size))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(int(self.rows.size)))
            Random(f"{self.seed}/epoch/{epoch}").shuffle(self._order)
        return self._order[at]

    def update(self, batch: Batch) -> None:
        """Learns nothing."""

    def state_dict(self) -> dict[str, Any]:
        """The cursor."""
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The cursor."""
        self.cursor = state["cursor"]


@CURRICULA.register("in_order")
@dataclass
class InOrder(Shuffled):
    """Rows as they stand in the data, from the start again after the last."""

    def _index(self, at: int) -> int:
        return at if self.rows.size == math.inf else at % int(self.rows.size)
