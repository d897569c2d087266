"""Sources: where batches come from. A source draws what the next updates are made of; the engine does the rest.

| name | gives | source of |
|---|---|---|
| dataset | demonstrations, or pairs | rows that hold them |
| on_policy | rollouts | the policy itself |

A source is a dataclass whose fields are the recipe's parameters, filed in `SOURCES`. `draw` returns updates; what it
must remember between steps goes into `state_dict`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError
from surgery.registry import Registry
from surgery.training.batch import Batch
from surgery.training.data import demonstrations, pairs

if TYPE_CHECKING:
    from surgery.training.context import Context

SOURCES: Registry[type[Source]] = Registry("source")
MAKERS = {"demonstrations": demonstrations, "pairs": pairs}
COLUMNS = {
    "demonstrations": ("prompt", "completion"),
    "pairs": ("prompt", "chosen", "rejected"),
    "rollouts": ("prompt",),
}


@dataclass
class Update:
    """What one optimizer step is made of (or several, when the recipe passes over rollouts more than once)."""

    batches: dict[str, Batch]
    """By kind."""
    optimizer: str = "policy"
    """Which optimizer state it moves: another name has moments of its own (ReLIFT)."""
    fresh: bool = False
    """Begin again from the initial weights, with an empty optimizer (RFT, STaR)."""


class Source:
    """Draws updates. Subclasses are dataclasses; they say what kinds they give and which columns they read."""

    gives: tuple[str, ...] = ()

    def columns(self) -> tuple[str, ...]:
        """Columns that every row must have."""
        return tuple(dict.fromkeys(c for kind in self.gives for c in COLUMNS[kind]))

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises `SurgeryError` for an impossible combination, before a model is loaded."""

    def draw(self, context: Context) -> list[Update]:
        """The next updates; never an empty list."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs: plain JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` was made."""


@SOURCES.register("dataset")
@dataclass
class Dataset(Source):
    """Demonstrations or pairs, `rows` of them a step (default: the recipe's `batch.rows`)."""

    kind: str = "demonstrations"

    def __post_init__(self) -> None:
        if self.kind not in MAKERS:
            raise SurgeryError(f"A data set gives demonstrations or pairs, not '{self.kind}'.")
        self.gives = (self.kind,)

    def draw(self, context: Context) -> list[Update]:
        """The curriculum's next rows, as tokens."""
        rows = context.rows(context.recipe.batch.rows, self.kind)
        return [Update({self.kind: context.encode(rows, self.kind)})]


@SOURCES.register("on_policy")
@dataclass
class OnPolicy(Source):
    """`rollouts.prompts` prompts, `rollouts.group` completions of each by the current policy."""

    gives: tuple[str, ...] = field(default=("rollouts",), init=False)

    def draw(self, context: Context) -> list[Update]:
        """Fresh rollouts with their rewards."""
        return [Update({"rollouts": context.rollouts(context.rows(context.recipe.rollouts.prompts))})]


class Together(Source):
    """Several sources at once: the updates of each, side by side (a sum of objectives that read different kinds)."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = list(parts)
        self.gives = tuple(kind for part in parts for kind in part.gives)

    def check(self, settings: Mapping[str, Any]) -> None:
        """Every part's."""
        for part in self.parts:
            part.check(settings)

    def draw(self, context: Context) -> list[Update]:
        """One update with the batches of all parts."""
        drawn = [part.draw(context) for part in self.parts]
        return [
            Update({k: b for update in each for k, b in update.batches.items()}) for each in zip(*drawn, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """By position."""
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """By position."""
        for i, part in enumerate(self.parts):
            part.load_state_dict(state[str(i)])
