"""`Selection`: which numbers of a model may move."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.registry import nearest
from surgery.weights.deltas.entries import place_type


@dataclass(frozen=True, eq=False)
class Slice:
    """Rows (`dim` 0) or columns (`dim` 1) of a matrix as it is stored, by number, ascending."""

    dim: int
    index: Tensor

    def count(self, shape: tuple[int, ...]) -> int:
        """How many numbers that is in a matrix of `shape`."""
        return len(self.index) * shape[1 - self.dim]

    def flat(self, shape: tuple[int, ...]) -> Tensor:
        """Their flat positions, ascending."""
        rows = self.index.long() if self.dim == 0 else torch.arange(shape[0], device=self.index.device)
        columns = self.index.long() if self.dim == 1 else torch.arange(shape[1], device=self.index.device)
        return (rows[:, None] * shape[1] + columns).flatten()


Places = Tensor | Slice | None
"""Of one parameter: sorted flat positions in row-major order, a slice, or None for all of it."""


@dataclass(frozen=True, eq=False)
class Selection:
    """For every parameter with numbers that may move: which. Other parameters stay as they are.

    `shapes` are those of the parameters in `places`; `total` is what `density` is taken of: the numbers of all the
    parameters that were up for selection. `method` says how it was made, `notes` what its next round
    has to know.
    """

    places: dict[str, Places]
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    method: str = ""
    total: int = 0
    notes: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.total:
            object.__setattr__(self, "total", sum(map(_numel, self.shapes.values())))

    @classmethod
    def of_masks(cls, masks: Mapping[str, Tensor], method: str = "masks") -> Selection:
        """From boolean tensors in the shapes of the parameters. Masks without a True are left out."""
        places: dict[str, Places] = {}
        for name, mask in masks.items():
            found = mask.reshape(-1).nonzero().view(-1)
            if len(found):
                places[name] = None if len(found) == mask.numel() else narrow(found, mask.numel())
        shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
        return cls(places, {n: shapes[n] for n in places}, method, sum(map(_numel, shapes.values())))

    def __repr__(self) -> str:
        return (f"Selection({self.method or 'given'}: {self.count:,} of {self.total:,} numbers "
                f"({self.density:.2%}) in {len(self.places)} tensors)")  # fmt: skip

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def counted(self, name: str) -> int:
        """How many numbers of one parameter may move."""
        places, shape = self.places[name], self.shapes[name]
        if places is None:
            return _numel(shape)
        return places.count(shape) if isinstance(places, Slice) else len(places)

    @property
    def count(self) -> int:
        """How many numbers may move."""
        return sum(map(self.counted, self.places))

    @property
    def density(self) -> float:
        """Their share of `total`."""
        return self.count / max(1, self.total)

    @property
    def whole(self) -> bool:
        """Whether parameters move as a whole or not at all."""
        return all(places is None for places in self.places.values())

    def flat(self, name: str) -> Tensor:
        """Sorted flat positions (int64) in one parameter; none for a parameter that stays."""
        if name not in self.places:
            return torch.zeros(0, dtype=torch.long)
        places = self.places[name]
        if places is None:
            return torch.arange(_numel(self.shapes[name]))
        return places.flat(self.shapes[name]) if isinstance(places, Slice) else places.long()

    def masks(self) -> dict[str, Tensor]:
        """Boolean tensors in the shapes of the parameters."""
        found = {}
        for name, shape in self.shapes.items():
            mask = torch.zeros(_numel(shape), dtype=torch.bool)
            mask[self.flat(name).cpu()] = True
            found[name] = mask.view(shape)
        return found

    def overlap(self, other: Selection) -> float:
        """|A and B| / min(|A|, |B|) (Composable SFT, arXiv:2110.07560, asks for it of deltas)."""
        shared = sum(int(torch.isin(self.flat(n).cpu(), other.flat(n).cpu()).sum()) for n in self.places if n in other)
        return shared / max(1, min(self.count, other.count))

    def both(self, other: Selection) -> Selection:
        """The numbers that are in either (their union)."""
        places: dict[str, Places] = {}
        shapes = self.shapes | other.shapes
        for name, shape in shapes.items():
            flat = torch.cat([self.flat(name).cpu(), other.flat(name).cpu()]).unique()
            places[name] = None if len(flat) == _numel(shape) else narrow(flat, _numel(shape))
        return Selection(places, shapes, f"{self.method} or {other.method}", max(self.total, other.total))

    def check(self, model: nn.Module) -> None:
        """Raises `SurgeryError` unless this fits the model: names, shapes, positions, and weights that can move."""
        parameters = dict(model.named_parameters())
        for name, shape in self.shapes.items():
            if name not in parameters:
                raise SurgeryError(
                    f"The selection is of another model: {type(model).__name__} has no parameter '{name}'.",
                    hint=nearest(name, parameters),
                )
            parameter = parameters[name]
            if tuple(parameter.shape) != tuple(shape):
                raise SurgeryError(
                    f"The selection is of another model: '{name}' is {list(shape)} in it, "
                    f"{list(parameter.shape)} in {type(model).__name__}.",
                    hint="Select again on this model.",
                )
            if not parameter.is_floating_point():
                raise SurgeryError(f"'{name}' is quantised ({parameter.dtype}): its numbers can't move by themselves.",
                                   hint="Load the model unquantised, or train a LoRA beside it.")  # fmt: skip
            places = self.places.get(name)
            if isinstance(places, Slice) and len(shape) != 2:
                raise SurgeryError(f"'{name}' is {list(shape)}: only matrices have rows and columns.")
            flat = places.index if isinstance(places, Slice) else places
            limit = _numel(shape) if not isinstance(places, Slice) else shape[places.dim]
            if flat is not None and len(flat) and not (int(flat[0]) >= 0 and int(flat[-1]) < limit
                                                       and bool((flat[1:] > flat[:-1]).all())):  # fmt: skip
                raise SurgeryError(f"Positions of '{name}' are not ascending, or beyond its {limit:,} numbers.")
        if not self.count:
            raise SurgeryError("The selection is empty: nothing would move.")

    # ---- on disk

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Positions as tensors, all else as JSON."""
        tensors, words = {}, {}
        for name, places in self.places.items():
            words[name] = {"shape": list(self.shapes[name]), "dim": places.dim if isinstance(places, Slice) else None}
            if places is not None:
                tensors[f"{name}.idx"] = places.index if isinstance(places, Slice) else places
        return tensors, {"method": self.method, "total": self.total, "notes": self.notes, "tensors": words}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> Selection:
        """The inverse of `tensors`."""
        places: dict[str, Places] = {}
        for name, entry in words["tensors"].items():
            found = tensors.get(f"{name}.idx")
            places[name] = found if entry["dim"] is None or found is None else Slice(entry["dim"], found)
        shapes = {name: tuple(entry["shape"]) for name, entry in words["tensors"].items()}
        return cls(places, shapes, words["method"], words["total"], words["notes"])

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Writes it as one safetensors file. Raises `SurgeryError` where there is one already, unless `force`."""
        from safetensors.torch import save_file

        tensors, words = self.tensors()
        path = Path(path)
        if path.exists() and not force:
            raise SurgeryError(f"There is already something at {path}.", hint="force=True overwrites it.")
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        held = {n: t.cpu().contiguous() for n, t in tensors.items()} or {":nothing": torch.zeros(1)}
        save_file(held, temporary, {"kind": "selection", "selection": json.dumps(words)})
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """What `save` wrote. Raises `SurgeryError` for a file that holds no selection."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                words = (file.metadata() or {}).get("selection")
                if words is None:
                    raise SurgeryError(f"{path} holds no selection.", hint="Selection.save writes one.")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise SurgeryError(f"{path} can't be read as a selection: {str(error).splitlines()[0]}",
                               hint=f"surgery tune select MODEL -o {path}") from None  # fmt: skip
        return cls.from_tensors(tensors, json.loads(words))


def narrow(flat: Tensor, numel: int) -> Tensor:
    """Positions in the smallest type that holds them: int32, or int64 for tensors of 2^31 numbers and more."""
    return flat.to(place_type(numel))


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
