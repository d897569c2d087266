"""What a peer's format of sparse deltas is here: a registry, a class to fill in, and what all of them need."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from surgery.checkpoint import Source
from surgery.checkpoint.provenance import header_hash
from surgery.errors import SurgeryError
from surgery.registry import Registry
from surgery.weights.deltas.entries import Entry, joined
from surgery.weights.deltas.file import SparseDelta
from surgery.weights.sources import Anchor, label
from surgery.weights.vector_file import identity

PEERS: Registry[type[Peer]] = Registry("format of sparse deltas")


@dataclass(frozen=True)
class Converted:
    """What `write` did: numbers kept, zeros added to fill up, tensors for which the format has no place."""

    out: Path
    count: int
    padded: int = 0
    left_out: list[str] = field(default_factory=list)


class Peer:
    """A format: `finds` says whether `path` is of it, `read` and `write` are the two ways."""

    name: ClassVar[str]

    def finds(self, path: Path) -> bool:
        raise NotImplementedError

    def read(self, path: Path, base: Source | None, *, allow_pickle: bool = False) -> SparseDelta:
        raise NotImplementedError

    def write(self, delta: SparseDelta, out: Path, *, force: bool = False) -> Converted:
        raise NotImplementedError


def record(path: Path, entries: dict[str, Entry], base: Source | None, method: str, **parameters: Any) -> SparseDelta:
    """A delta of mode "add" from a peer's file, with the record of its base where that is at hand."""
    sums: dict[str, str] = {}
    for name, entry in entries.items():
        info = None if base is None else base.tensors.get(name)
        if base is not None and (info is None or info.shape != entry.shape or not info.is_float):
            found = "has no such tensor" if info is None else f"has {info.dtype} {list(info.shape)}"
            raise SurgeryError(f"{path} does not fit {base.path}: for '{name}' {list(entry.shape)} it {found}.")
        if base is not None:
            sums[name] = str(Anchor.of(base).checksum(name))
    about = None if base is None else identity(label(base), header_hash(base), base, {})
    sizes = [e.numel for e in entries.values()] if base is None else [
        i.numel for i in base.tensors.values() if i.is_float
    ]  # fmt: skip
    types = {} if base is None else {name: base.tensors[name].dtype for name in entries}
    return SparseDelta(entries, "add", about, sums, sum(sizes), path.name, types, method, parameters, path, base)


def sorted_entry(where: str, name: str, shape: tuple[int, ...], places: Tensor, values: Tensor) -> Entry:
    """An entry from positions in any order; zeros, with which peers fill up, are dropped."""
    if places.numel() and (int(places.min()) < 0 or int(places.max()) >= math.prod(shape)):
        raise SurgeryError(f"{where}: tensor '{name}' of shape {list(shape)} has positions outside of it.")
    places, order = places.long().sort()
    if places.numel() and not bool((places[1:] > places[:-1]).all()):
        raise SurgeryError(f"{where}: tensor '{name}' has a position twice.")
    values = values.reshape(-1)[order]
    kept = values != 0
    return joined(shape, [places[kept]], [values[kept]], values.dtype)
