"""What a source is, what it draws, and several of them side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from surgery.registry import Registry
from surgery.training.batch import Batch

if TYPE_CHECKING:
    from surgery.training.context import Context

SOURCES: Registry[type[Source]] = Registry("source")
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
    """Kinds of batches in its updates."""
    samples = False
    """Whether it draws completions, though it gives no rollouts."""
    restarts = False
    """Whether some of its updates are `fresh`: the engine then keeps the initial weights."""

    @property
    def draws(self) -> str:
        """Which of the recipe's rows it takes from the curriculum: those for rollouts, demonstrations or pairs."""
        return "rollouts" if self.samples else self.gives[0]

    def columns(self) -> tuple[str, ...]:
        """Columns that every row must have."""
        return tuple(dict.fromkeys(c for kind in self.gives for c in COLUMNS[kind]))

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises `SurgeryError` for an impossible combination, before a model is loaded.

        `settings` holds recipe, group, source, columns of the data and components (names of the rewards).
        """

    def draw(self, context: Context) -> list[Update]:
        """The next updates; never an empty list."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs: plain JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` was made."""


class Together(Source):
    """Several sources at once: the updates of each, side by side (a sum of objectives that read different kinds)."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = list(parts)
        self.gives = tuple(kind for part in parts for kind in part.gives)
        self.samples = any(part.samples for part in parts)
        self.restarts = any(part.restarts for part in parts)

    def check(self, settings: Mapping[str, Any]) -> None:
        """Every part's."""
        for part in self.parts:
            part.check(settings)

    def draw(self, context: Context) -> list[Update]:
        """The first part's updates, each with an ordinary one of every other part beside it.

        An update that is by itself (of another optimizer) stays so.
        """
        first, *others = self.parts
        found = []
        for update in first.draw(context):
            if update.optimizer == "policy":
                beside = [other.draw(context)[0] for other in others]
                update = replace(update, batches={k: b for u in (update, *beside) for k, b in u.batches.items()})
            found.append(update)
        return found

    def state_dict(self) -> dict[str, Any]:
        """By position."""
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """By position."""
        for i, part in enumerate(self.parts):
            part.load_state_dict(state[str(i)])


def joined(batches: Sequence[Batch]) -> Batch:
    """One batch of the rows of several of the same kind, group size and columns, as wide as the widest."""
    prompt = max(b.prompt_ids.shape[1] for b in batches)
    completion = max(b.completion_ids.shape[1] for b in batches)

    def one(name: str, parts: Sequence[Tensor]) -> Tensor:
        if name.startswith("prompt_"):
            parts = [pad(part, (prompt - part.shape[1], 0)) for part in parts]
        elif parts[0].dim() == 2:
            parts = [pad(part, (0, completion - part.shape[1])) for part in parts]
        return torch.cat(list(parts))

    tensors: dict[str, Any] = {
        name: one(name, [getattr(b, name) for b in batches])
        for name, value in vars(batches[0]).items()
        if isinstance(value, Tensor)
    }
    whole = replace(
        batches[0],
        rows=[row for b in batches for row in b.rows],
        columns={name: one(name, [b[name] for b in batches]) for name in batches[0].columns},
        **tensors,
    )
    return whole.with_totals()
