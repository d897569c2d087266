"""`SparseDelta`: the few numbers that a fine-tuning moved, as one small file that applies and reverts bit for bit.

```python
delta = SparseDelta.between("tiny-base", model)       # folders, names of the zoo, models in memory
delta.save("chain.safetensors")
with SparseDelta.load("chain.safetensors").applied(model): ...
SparseDelta.load("chain.safetensors").vector() * 0.5  # a TaskVector like any other
```

| tensor        | what it holds                                                                                |
|---------------|----------------------------------------------------------------------------------------------|
| `<name>.idx`  | sorted flat row-major positions, int32 (int64 from 2**31 numbers on)                         |
| `<name>.val`  | as many numbers: the tuned model's (mode "set"), or tuned - base (mode "add")                |
| `<name>`      | all numbers of a tensor that moved nearly everywhere, where that is smaller                  |

"set" restores the tuned model's bits on its own base and needs that base to be read as differences; "add" stands
alone and can be added up, but base + (tuned - base) is not the tuned model's bits in general. Metadata, all strings:
`kind`, `format_version`, `mode`, `base` (name, digests of header, config and tokenizer), `checksums` (xxh3_128 of
every touched tensor of the base: quick, not cryptographic) and its `types`, `density`, `total`, `method`,
`parameters`, `shapes`.
Composition by addition of sparse differences: LT-SFT, arXiv:2110.07560.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from surgery.checkpoint import Checkpoint, CheckpointWriter, Source, TensorInfo, open_checkpoint, read_header
from surgery.checkpoint.header import FLOATS, ITEM_BYTES, dtype_code
from surgery.checkpoint.reader import SINGLE
from surgery.checkpoint.writer import check_target
from surgery.errors import SurgeryError
from surgery.weights.deltas.entries import LONG, MOST, Entry
from surgery.weights.opening import open_model
from surgery.weights.sources import flat
from surgery.weights.vector_file import EMPTY, Recorded

if TYPE_CHECKING:
    from surgery.weights.apply import Applied
    from surgery.weights.live import Undo
    from surgery.weights.vector import TaskVector

VERSION = 1
KIND = "sparse delta"
Mode = Literal["set", "add"]
_PLACES = {"I32": torch.int32, "I64": torch.int64}


@dataclass(frozen=True, repr=False)
class SparseDelta:
    """What a fine-tuning moved: an `Entry` for every touched tensor, and a record of the base it belongs to.

    `total` counts the numbers of the whole base, of which `count` are kept; `types` are the storage types of its
    touched tensors. `source` is the base itself, where it is at hand. Made by `between`, `of`, `load` and `compose`.
    """

    entries: Mapping[str, Entry]
    mode: Mode
    base: Mapping[str, Any] | None
    checksums: Mapping[str, str]
    total: int
    definition: str
    types: Mapping[str, str] = field(default_factory=dict)
    method: str = "difference"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    path: Path = Path("the delta")
    source: Source | None = None

    # Where deltas come from

    @classmethod
    def between(cls, base: Any, tuned: Any, mode: Mode = "set", **options: Any) -> SparseDelta:
        """The numbers of `tuned` that differ bitwise from `base`; see `extract.between` for the options."""
        from surgery.weights.deltas.extract import between

        return between(base, tuned, mode, **options)

    @classmethod
    def of(cls, vector: TaskVector, **options: Any) -> SparseDelta:
        """The numbers of any vector that are not zero, mode "add"; see `extract.of_vector`."""
        from surgery.weights.deltas.extract import of_vector

        return of_vector(vector, **options)

    @classmethod
    def load(cls, path: str | Path, base: Any = None) -> SparseDelta:
        """A delta from its file, every position and number of it looked at once.

        Sizes are checked from headers before memory is taken. Raises `SurgeryError` for a file that is damaged,
        and for a `base` of other tensors.
        """
        delta = _read(Path(path).expanduser())
        return delta if base is None else delta.bound(base)

    @staticmethod
    def compose(deltas: Sequence[SparseDelta], base: Any = None, **options: Any) -> SparseDelta:
        """Several deltas of one base added up; see `algebra.compose`."""
        from surgery.weights.deltas.algebra import compose

        return compose(deltas, base, **options)

    # What is in it

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    @property
    def count(self) -> int:
        """Numbers that it keeps."""
        return sum(entry.count for entry in self.entries.values())

    @property
    def density(self) -> float:
        return self.count / max(1, self.total)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return f"SparseDelta({self.definition}: {self.count:,} of {self.total:,} numbers, mode {self.mode})"

    def vector(self, base: Any = None) -> TaskVector:
        """The delta as a `TaskVector`. In mode "set" it needs the base to be read as numbers (not to be applied)."""
        from surgery.weights.vector import TaskVector

        found = Scattered(self, self.source)
        return TaskVector(found if base is None else found.bound(opened(base)))

    def bound(self, base: Any) -> SparseDelta:
        """The same with its base at hand. Raises `SurgeryError` when that has other tensors than the delta's base."""
        source = Scattered(self).bound(opened(base)).base
        return replace(self, source=source)

    def restricted(self, names: Any) -> SparseDelta:
        """Those of its tensors that `names` holds. Raises `SurgeryError` when none is left."""
        kept = {name: entry for name, entry in self.entries.items() if name in names}
        if not kept:
            raise SurgeryError(f"Nothing is left of {self.definition}.", hint="Look at the names: delta.shapes.")
        sums = {name: value for name, value in self.checksums.items() if name in kept}
        return replace(self, entries=kept, checksums=sums)

    def added(self, base: Any = None) -> SparseDelta:
        """The same in mode "add": float32 differences from the base, which is compared by its checksums."""
        from surgery.weights.deltas.extract import added

        return added(self, base)

    # Putting it somewhere

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Writes it as one `.safetensors` file: at most 8.1 bytes for a float32 number, 6.1 for one of 16 bits.

        Raises `SurgeryError` when `path` exists without `force`, or is no name for such a file.
        """
        path = Path(path).expanduser()
        if path.suffix != ".safetensors":
            raise SurgeryError(f"A delta is one .safetensors file; '{path.name}' is no name for it.",
                               hint=f"Call it {path.name}.safetensors.")  # fmt: skip
        check_target(path, force=force)
        if path.is_dir():
            raise SurgeryError(f"{path} is a folder; a delta is one file.", hint="Choose another name.")
        parts = _parts(self.entries)
        infos = [TensorInfo(name, code, shape) for name, (code, shape, _) in parts.items()]
        infos.sort(key=lambda info: -ITEM_BYTES[info.dtype])  # every tensor then starts on a multiple of its item
        folder = path.parent / f".{path.name}.folder"
        with CheckpointWriter(folder, infos, metadata=_metadata(self), force=True, shard_size=1 << 60) as writer:
            for info in infos:
                writer.write(info.name, parts[info.name][2])
        os.replace(folder / SINGLE, path)
        folder.rmdir()
        return path

    def apply(
        self, base: Any, out: str | Path, *, undo: str | Path | None = None, force: bool = False, **options: Any
    ) -> Applied:
        """Writes the base with the delta as a checkpoint; at scale 1, mode "set" gives the tuned model's bits.

        `options` are those of `TaskVector.apply`. A file can't be taken out of a model without the numbers that it
        replaced, so `undo` names a delta to write which turns `out` into its base again, bit for bit.
        """
        from surgery.weights.deltas.extract import apply_with_undo

        return apply_with_undo(self.vector(), base, out, undo=undo, force=force, **options)

    def revert(self, tuned: Any, out: str | Path, base: Any = None, **options: Any) -> Applied:
        """Writes `tuned` with the delta's numbers as the base has them; what else was done to `tuned` stays.

        Both modes need the base (subtracting would not give its bits), or the `undo` file that `apply` wrote. Raises
        `SurgeryError` when `tuned` does not hold the delta.
        """
        from surgery.weights.deltas.extract import reverse

        return reverse(self, opened(tuned), self.source if base is None else opened(base)).apply(tuned, out, **options)

    @torch.no_grad()
    def apply_to(self, model: nn.Module, scale: float = 1.0, *, transfer: bool = False) -> Undo:
        """Puts the delta into a model in memory; `undo()` on the answer puts back every bit it has changed.

        Only the numbers that move are touched and kept. Mode "set" at scale 1 gives the tuned model's bits, and
        asks that the touched tensors are the base's, by checksum (`transfer=True`: whatever they are); mode "add"
        is added to any model, float32 rounded once. After an exception the model is as before.
        """
        from surgery.weights.deltas.extract import put_into

        return put_into(self, model, scale, transfer)

    @contextmanager
    def applied(self, model: nn.Module, scale: float = 1.0, *, transfer: bool = False) -> Iterator[nn.Module]:
        """Within: the model with the delta. After it, also after an exception, every bit is as before."""
        undo = self.apply_to(model, scale, transfer=transfer)
        try:
            yield model
        finally:
            undo()


@dataclass(frozen=True, eq=False)
class Scattered(Recorded):
    """A sparse delta as an expression: zero but for its entries."""

    file: SparseDelta

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        entry = self.file.entries[name]
        if self.file.mode == "add":
            return entry.put(torch.zeros(stop - start), start)
        if self.base is None or name not in self.base.tensors:
            raise SurgeryError(
                f"{self.file.path} keeps the tuned model's numbers; to read differences its base is needed.",
                hint="Name it: --base BASE, in Python TaskVector.load(path, base=BASE).",
            )
        before = flat(self.base, name, start, stop)
        after = self.restored(name, start, stop, before)
        wide = torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32
        numbers = (after.to(wide) - before.to(wide)).float()
        if not bool(torch.isfinite(numbers.sum())):
            self.refuse(name, numbers)
        return numbers

    def exact(self, name: str) -> str | None:
        return self.file.entries[name].code if self.file.mode == "set" else None

    def restored(self, name: str, start: int, stop: int, base: Tensor) -> Tensor:
        self._compare(name)
        entry = self.file.entries[name]
        return entry.put(base.to(entry.values.dtype, copy=True), start)

    def key(self) -> Any:
        return id(self.file.entries), None if self.base is None else self.base.path


def is_delta(path: str | Path) -> bool:
    """Whether `path` is the file of a sparse delta."""
    path = Path(path).expanduser()
    return path.suffix == ".safetensors" and path.is_file() and read_header(path).metadata.get("kind") == KIND


def opened(spec: Any) -> Source:
    """A folder, a file, a name of the zoo or of the hub, a model in memory, or a source, as a source."""
    from surgery import zoo

    if isinstance(spec, (str, Path)):
        return open_model(zoo.resolved(str(spec)))
    if hasattr(spec, "state_dict"):
        from surgery.weights.live import ModelSource

        return ModelSource(spec)
    return spec


# ---- the file ------------------------------------------------------------------------------------------------------


def _parts(entries: Mapping[str, Entry]) -> dict[str, tuple[str, tuple[int, ...], Tensor]]:
    """What is stored: name -> (type, shape, numbers)."""
    parts: dict[str, tuple[str, tuple[int, ...], Tensor]] = {}
    for name, entry in entries.items():
        own = {name: entry.values} if entry.places is None else {
            f"{name}.idx": entry.places, f"{name}.val": entry.values
        }  # fmt: skip
        for part, numbers in own.items():
            if part in parts or (part != name and part in entries):
                raise SurgeryError(f"Two tensors of {name} would be called '{part}' in the file.")
            shape = entry.shape if part == name else (numbers.numel(),)
            parts[part] = dtype_code(str(numbers.dtype)), shape, numbers
    return parts or {EMPTY: ("U8", (1,), torch.zeros(1, dtype=torch.uint8))}


def _metadata(delta: SparseDelta) -> dict[str, str]:
    content: dict[str, Any] = {
        "kind": KIND, "format_version": VERSION, "mode": delta.mode, "definition": delta.definition,
        "method": delta.method, "parameters": dict(delta.parameters), "density": delta.density, "total": delta.total,
        "base": None if delta.base is None else dict(delta.base), "checksum": "xxh3_128",
        "checksums": dict(delta.checksums), "types": dict(delta.types),
        "shapes": {name: list(shape) for name, shape in delta.shapes.items()},
    }  # fmt: skip
    return {k: v if isinstance(v, str) else json.dumps(v, separators=(",", ":")) for k, v in content.items()}


def _read(path: Path) -> SparseDelta:
    source = open_checkpoint(path)
    assert isinstance(source, Checkpoint)
    metadata = read_header(path).metadata if path.is_file() else {}
    if metadata.get("kind") != KIND:
        raise SurgeryError(
            f"{path} is not a sparse delta.",
            hint="Extract one: `surgery delta extract BASE TUNED -o FILE`. Peers' files: `surgery delta convert`.",
        )
    try:
        version, shapes, base, sums, types, total, parameters = (
            json.loads(metadata[key])
            for key in ("format_version", "shapes", "base", "checksums", "types", "total", "parameters")
        )
        words = {key: metadata[key] for key in ("mode", "definition", "method")}
        for name, shape in shapes.items():
            if not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) >= MOST:
                raise ValueError(f"shape of {name}")
        mode: Mode = "set" if words["mode"] == "set" else "add"
        _expect(words["mode"] == mode, "mode")
        _expect(base is None or isinstance(base, dict), "base")
        _expect(isinstance(sums, dict) and all(isinstance(v, str) for v in sums.values()), "checksums")
        _expect(isinstance(types, dict) and all(v in ITEM_BYTES for v in types.values()), "types")
        _expect(type(total) is int and total >= 0 and isinstance(parameters, dict), "total or parameters")
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SurgeryError(f"{path} has broken metadata: {error!r}.", hint="Extract it again.") from None
    if version != VERSION:
        raise SurgeryError(f"{path} has format version {version}; this program reads {VERSION}.")
    entries = {name: _entry(source, path, name, tuple(shape)) for name, shape in shapes.items()}
    stored = {part for name in shapes for part in (name, f"{name}.idx", f"{name}.val")} | {EMPTY}
    if odd := [part for part in source.tensors if part not in stored]:
        raise SurgeryError(f"{path} holds '{odd[0]}', of which its list of shapes does not know.",
                           hint="Extract it again.")  # fmt: skip
    for name, entry in entries.items():
        entry.check(str(path), name)
    return SparseDelta(entries, mode, base, sums, total, words["definition"], types, words["method"], parameters, path)


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _entry(source: Checkpoint, path: Path, name: str, shape: tuple[int, ...]) -> Entry:
    """One tensor of the file: types, lengths and sizes by the header; no number is read."""
    infos = {part: source.tensors.get(f"{name}{part}") for part in ("", ".idx", ".val")}
    whole, places, values = infos.values()
    again = "The file is damaged: extract the delta again."
    if whole is not None and places is None and values is None:
        if whole.shape != shape or whole.dtype not in FLOATS:
            found = f"{whole.dtype} {list(whole.shape)}"
            raise SurgeryError(f"{path}: '{name}' is {found}; numbers of shape {list(shape)} are needed.", hint=again)
        return Entry(shape, None, source.read(name).reshape(-1))
    if places is None or values is None or whole is not None:
        lacks = "is there twice" if whole is not None else f"lacks '{name}{'.idx' if places is None else '.val'}'"
        raise SurgeryError(f"{path}: tensor '{name}' {lacks}.", hint=again)
    if places.dtype not in _PLACES or values.dtype not in FLOATS or len(places.shape) != 1:
        found = f"positions are {places.dtype} {list(places.shape)} and values {values.dtype}"
        raise SurgeryError(f"{path}: tensor '{name}': {found}; flat int32 or int64 and floats are needed.", hint=again)
    if values.shape != places.shape or places.numel > math.prod(shape):
        found = f"{places.numel:,} positions and {values.numel:,} values of {math.prod(shape):,} numbers"
        raise SurgeryError(f"{path}: tensor '{name}' has {found}.", hint=again)
    if places.dtype == "I32" and math.prod(shape) >= LONG:
        raise SurgeryError(f"{path}: tensor '{name}' of {list(shape)} needs int64 positions.", hint=again)
    return Entry(shape, source.read(f"{name}.idx"), source.read(f"{name}.val"))
