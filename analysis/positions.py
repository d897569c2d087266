"""Places in prompts, one a row: how a position is said, and which column of a batch it is.

| position | where it is |
|---|---|
| 5, -1 | the same in every prompt, counted from the first real token or from the last |
| tensor or list of such numbers | of each prompt its own |
| function of a `Batch` | what it gives, (batch,): `earlier(-3)` looks for an earlier occurrence of a token |
| a name | looked up in `positions=`, so that a circuit's file need not know the prompts |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.models import Batch
from surgery.registry import nearest

Position = int | Tensor | Sequence[int] | Callable[[Batch], Any]


def columns_of(position: Position, batch: Batch, what: str = "position") -> Tensor:
    """(batch,) the column of a position in each row of a batch that is padded on the right, if at all.

    Raises `SurgeryError` for what is no position, and naming the first prompt that has no such token.
    """
    given = position(batch) if callable(position) else position
    try:
        numbers = torch.as_tensor(given, device=batch.ids.device)
        if numbers.dtype == torch.bool or numbers.is_floating_point():
            raise TypeError
        numbers = numbers.long().expand(len(batch))
    except (TypeError, ValueError, RuntimeError):
        raise SurgeryError(f"The {what} is one whole number, or one for each of the {len(batch)} prompts, and not "
                           f"{_told(given)}.") from None  # fmt: skip
    columns = torch.where(numbers < 0, batch.lengths + numbers, numbers)
    if bool((wrong := (columns < 0) | (columns >= batch.lengths)).any()):
        row = int(wrong.int().argmax())
        raise SurgeryError(
            f"The {what} of prompt {row} is {int(numbers[row])}, and it has {int(batch.lengths[row])} tokens."
        )
    return columns


def found(position: Position | str, positions: Mapping[str, Position] | None, what: str) -> Position:
    """A position as it is, or the one of that name. Raises `SurgeryError` for a name that nobody has explained."""
    if not isinstance(position, str):
        return position
    if not positions or position not in positions:
        known = nearest(position, positions) + " " if positions else ""
        raise SurgeryError(f"{what} is at '{position}', and nothing says where that is.",
                           hint=f"{known}Pass positions={{'{position}': ...}}.")  # fmt: skip
    return positions[position]


def earlier(position: int) -> Callable[[Batch], Tensor]:
    """Where the token at `position` occurs for the first time, before it: `earlier(-3)` is the label asked about.

    The function raises `SurgeryError` naming the first prompt in which it does not occur before.
    """

    def columns(batch: Batch) -> Tensor:
        here = columns_of(position, batch)
        rows = torch.arange(len(batch), device=here.device)
        before = torch.arange(batch.ids.shape[1], device=here.device) < here[:, None]
        same = (batch.ids == batch.ids[rows, here][:, None]) & before & batch.mask
        if bool((none := ~same.any(1)).any()):
            row = int(none.int().argmax())
            raise SurgeryError(f"The token at {position} of prompt {row} (id {int(batch.ids[row, here[row]])}) does "
                               "not occur before it.", hint="Pass the position of each prompt.")  # fmt: skip
        return same.int().argmax(1)

    return columns


def _told(thing: Any) -> str:
    return f"{tuple(thing.shape)} of {thing.dtype}" if isinstance(thing, Tensor) else repr(thing)[:60]
