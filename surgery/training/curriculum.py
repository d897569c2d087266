"""Which rows come next. A curriculum's choice is a function of its seed and of what it was told so far.

| name | the next row |
|---|---|
| shuffled | every row once an epoch, in random order |
| in_order | as they stand |
| random | a category, each equally likely; any row of it |
| sec | a category by what its rows taught lately; any row of it (SEC) |
| by_difficulty | any row among the easiest, ever more of them |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from surgery.errors import SurgeryError
from surgery.registry import Registry
from surgery.training.batch import Batch
from surgery.training.data import MixedRows, Row, Rows, rows_of


class Curriculum(Protocol):
    """Decides which rows come next, and may learn from what became of them."""

    def start(self, rows: Rows, seed: int) -> None:
        """Called once, before anything else."""

    def next(self, n: int) -> list[Row]:
        """The next `n` rows."""

    def update(self, batch: Batch) -> None:
        """Told every batch of rollouts once its rewards and advantages are known."""

    def metrics(self) -> dict[str, float]:
        """Numbers for the next log line."""

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

    def metrics(self) -> dict[str, float]:
        """None."""
        return {}

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


@CURRICULA.register("random")
@dataclass
class ByCategory:
    """A category with equal probability, then its next row in an order shuffled each time all its rows are through.

    Categories are the column `column` of the data; of generated data, of the first `pool` rows of the stream. Or
    `categories` maps their names to data of their own, written as a recipe's `data`.
    """

    categories: Mapping[str, Any] = field(default_factory=dict)
    column: str = "category"
    pool: int = 1024

    def start(self, rows: Rows, seed: int) -> None:
        """Sorts the rows into categories. Raises `SurgeryError` for rows without one."""
        self.rows, self.seed, self.draws = rows, seed, 0
        self._orders: dict[str, tuple[int, list[int]]] = {}
        self.items: dict[str, Rows | list[Row]] = {}
        if self.categories:
            parts = [rows_of(written, seed + i) for i, written in enumerate(self.categories.values())]
            self.items = dict(zip(self.categories, parts, strict=True))
            self.rows = MixedRows(parts, [1.0] * len(parts), seed)  # what the columns are checked of
            self.rows.columns.add(self.column)
        else:
            for row in _finite(rows, self.pool):
                if row.get(self.column) is None:
                    raise SurgeryError(
                        f"A row has no '{self.column}', by which the curriculum chooses.",
                        hint=f"Columns: {', '.join(sorted(row))}; or give the curriculum `categories`.",
                    )
                self.items.setdefault(str(row[self.column]), []).append(row)  # type: ignore[union-attr]
            self.items = dict(sorted(self.items.items()))
        self.taken = dict.fromkeys(self.items, 0)

    def probabilities(self) -> dict[str, float]:
        """Of each category to be the next."""
        return dict.fromkeys(self.items, 1 / len(self.items))

    def next(self, n: int) -> list[Row]:
        """`n` categories, independently, and a row of each; rows carry their category in `column`."""
        chances = self.probabilities()
        found = []
        for _ in range(n):
            name = Random(f"{self.seed}/category/{self.draws}").choices(list(chances), list(chances.values()))[0]
            found.append({**self._row(name, self.taken[name]), self.column: name})
            self.taken[name] += 1
            self.draws += 1
        return found

    def _row(self, name: str, at: int) -> Row:
        items = self.items[name]
        size = len(items) if isinstance(items, list) else items.size
        if size != math.inf:
            epoch, at = divmod(at, int(size))
            if self._orders.get(name, (-1, []))[0] != epoch:
                self._orders[name] = epoch, list(range(int(size)))
                Random(f"{self.seed}/{name}/{epoch}").shuffle(self._orders[name][1])
            at = self._orders[name][1][at]
        return dict(items[at]) if isinstance(items, list) else items.row(at)

    def update(self, batch: Batch) -> None:
        """Learns nothing."""

    def metrics(self) -> dict[str, float]:
        """None."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """How many rows were taken, of each category."""
        return {"draws": self.draws, "taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The same."""
        self.draws, self.taken = state["draws"], dict(state["taken"])


@CURRICULA.register("sec")
@dataclass
class SEC(ByCategory):
    """Self-evolving curriculum (Chen et al. 2025, arXiv:2505.14970): a bandit over categories.

    Each is drawn by softmax(Q / `temperature`). What a batch taught about category c is r(c) = mean |advantage| over
    its rollouts; then Q(c) becomes `rate` * r(c) + (1 - `rate`) * Q(c); categories that weren't in the batch keep
    theirs. All Q begin at 0. A category that is learned and one that is hopeless look the same: r = 0.
    """

    rate: float = 0.5
    temperature: float = 0.4

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1 or self.temperature <= 0:
            raise SurgeryError(
                f"Curriculum 'sec': rate {self.rate}, temperature {self.temperature}; expected 0 to 1, and above 0."
            )

    def start(self, rows: Rows, seed: int) -> None:
        """Sorts the rows into categories."""
        super().start(rows, seed)
        self.values = dict.fromkeys(self.items, 0.0)

    def probabilities(self) -> dict[str, float]:
        """softmax(Q / temperature)."""
        most = max(self.values.values())
        weights = {name: math.exp((q - most) / self.temperature) for name, q in self.values.items()}
        total = math.fsum(weights.values())
        return {name: weight / total for name, weight in weights.items()}

    def metrics(self) -> dict[str, float]:
        """The probability of each category."""
        return {f"curriculum/{name}": p for name, p in self.probabilities().items()}

    def update(self, batch: Batch) -> None:
        """Q of the batch's categories moves towards the mean size of their advantages."""
        size = batch["advantage"].abs().double()
        if size.dim() == 2:  # one a token: their mean over the tokens that count
            size = (size * batch.mask).sum(1) / batch.mask.sum(1).clamp(min=1.0)
        seen: dict[str, list[float]] = {}
        for row, value in zip(batch.rows, size.tolist(), strict=True):
            seen.setdefault(str(row.get(self.column)), []).append(value)
        for name, values in seen.items():
            if name in self.values:
                mean = math.fsum(values) / len(values)
                self.values[name] = self.rate * mean + (1 - self.rate) * self.values[name]

    def state_dict(self) -> dict[str, Any]:
        """Rows taken, and Q."""
        return {**super().state_dict(), "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The same."""
        super().load_state_dict(state)
        self.values = dict(state["values"])


@CURRICULA.register("by_difficulty")
@dataclass
class ByDifficulty:
    """Uniform over the easiest share c of the rows, c rising along a line from `begin` to 1 while `over` rows are drawn
    (Platanios et al. 2019, arXiv:1903.09848, linear competence). `column` holds numbers, larger ones harder.

    Of generated data the first `pool` rows are used; `over` 0 is as many as there are rows.
    """

    column: str = "difficulty"
    begin: float = 0.1
    over: int = 0
    pool: int = 1024

    def start(self, rows: Rows, seed: int) -> None:
        """Sorts the rows. Raises `SurgeryError` for rows without a number."""
        self.seed, self.draws = seed, 0
        found = list(_finite(rows, self.pool))
        for row in found:
            if not isinstance(row.get(self.column), int | float):
                raise SurgeryError(
                    f"A row has {row.get(self.column)!r} for '{self.column}', by which the curriculum sorts.",
                    hint="A number is expected; `column` names another column.",
                )
        self.items = sorted(found, key=lambda row: row[self.column])

    def next(self, n: int) -> list[Row]:
        """`n` rows within reach."""
        rows = []
        for _ in range(n):
            share = min(1.0, self.begin + (1 - self.begin) * self.draws / (self.over or len(self.items)))
            reach = max(1, math.ceil(share * len(self.items)))
            rows.append(dict(self.items[Random(f"{self.seed}/difficulty/{self.draws}").randrange(reach)]))
            self.draws += 1
        return rows

    def update(self, batch: Batch) -> None:
        """Learns nothing."""

    def metrics(self) -> dict[str, float]:
        """None."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Rows drawn."""
        return {"draws": self.draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The same."""
        self.draws = state["draws"]


def _finite(rows: Rows, pool: int) -> Sequence[Row]:
    return [rows.row(i) for i in range(pool if rows.size == math.inf else int(rows.size))]
