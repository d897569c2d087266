"""Where the chosen numbers of a model stand in the one vector that an optimizer keeps of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.tuning.selection.places import Places, Selection, Slice, narrow


@dataclass(eq=False)
class Bank:
    """The chosen numbers of one parameter: `start:stop` of the vector of all."""

    name: str
    parameter: nn.Parameter
    places: Tensor | None
    part: Places
    start: int
    stop: int
    fresh: bool = True
    """Whether no gradient has come since the last `zero_grad`."""

    @property
    def flat(self) -> Tensor:
        return self.parameter.detach().view(-1)

    def to(self, device: torch.device) -> None:
        if self.places is not None and self.places.device != device:
            self.places = self.places.to(device)


def banks_of(model: nn.Module, selection: Selection) -> list[Bank]:
    """One bank for each parameter with chosen numbers, in the model's order, whatever the selection's.

    Raises `SurgeryError` for a selection that does not fit, for sharded parameters, and for several devices.
    """
    selection.check(model)
    banks, at = [], 0
    for name, p in model.named_parameters():
        if name not in selection.places:
            continue
        if hasattr(p, "device_mesh"):
            raise SurgeryError(f"'{name}' is cut up over processes (FSDP2): it has no entries to name.",
                               hint="Use DDP for sparse tuning, or FSDP2 with full fine-tuning.")  # fmt: skip
        if not p.is_contiguous():
            raise SurgeryError(f"'{name}' does not lie in one piece in memory.", hint="Make it .contiguous().")
        part, count = selection.places[name], selection.counted(name)
        places = part.flat(selection.shapes[name]) if isinstance(part, Slice) else part
        if places is not None:  # the selection's own tensor where that will do: it is held once
            places = narrow(places, p.numel()).to(p.device)
        banks.append(Bank(name, p, places, part, at, at + count))
        at += count
    devices = {bank.parameter.device for bank in banks}
    if len(devices) > 1:
        raise SurgeryError(f"The chosen parameters are on {len(devices)} devices.", hint="Select on one of them.")
    return banks


def read(flat: Tensor, places: Tensor | None) -> Tensor:
    """The numbers at `places` of a flat tensor; all of them without."""
    return flat if places is None else flat.index_select(0, places)


def shared(old: Bank, new: Bank) -> tuple[Tensor, Tensor]:
    """Where the numbers that two banks share stand in the vectors of old and new."""
    device = new.parameter.device
    if old.places is None and new.places is None:
        span = torch.arange(new.stop - new.start, device=device)
        return span + old.start, span + new.start
    if old.places is None:
        assert new.places is not None
        return new.places.long() + old.start, torch.arange(len(new.places), device=device) + new.start
    if new.places is None:
        return torch.arange(len(old.places), device=device) + old.start, old.places.long() + new.start
    before = old.places.to(device)
    at = torch.searchsorted(before, new.places).clamp(max=len(before) - 1)  # both are ascending
    there = (before[at] == new.places).nonzero().view(-1)
    return at[there] + old.start, there + new.start


def used(births: list[int], born: Tensor) -> tuple[list[int], Tensor]:
    """Only the births that some number still has; one byte for each number while there are at most 255 of them."""
    counts = torch.bincount(born.int(), minlength=len(births)).tolist()
    alive = [i for i, n in enumerate(counts) if n]
    number = torch.zeros(len(births), dtype=torch.int16, device=born.device)
    number[alive] = torch.arange(len(alive), dtype=torch.int16, device=born.device)
    return [births[i] for i in alive], number[born.int()].to(torch.uint8 if len(alive) <= 255 else torch.int16)


def on(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """An optimizer's state on a device; its count of steps stays where it is."""
    return {k: v.to(device) if isinstance(v, Tensor) and k != "step" else v for k, v in state.items()}


def same(one: Selection, other: Selection) -> bool:
    """Whether two selections name the same numbers."""
    mine, theirs = one.tensors(), other.tensors()
    return mine[1]["tensors"] == theirs[1]["tensors"] and all(
        torch.equal(t.cpu(), theirs[0][name].cpu()) for name, t in mine[0].items()
    )
