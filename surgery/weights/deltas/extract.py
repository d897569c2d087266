"""Sparse deltas made from models and put into models: what moved, the way back, and models in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.checkpoint import Source
from surgery.checkpoint.header import dtype_code, torch_dtype
from surgery.checkpoint.provenance import Checksum, header_hash, tensor_checksum
from surgery.checkpoint.writer import check_target
from surgery.errors import SurgeryError
from surgery.weights.deltas.entries import Entry, joined, members, smaller_whole, storage_bits
from surgery.weights.deltas.file import Mode, SparseDelta, opened
from surgery.weights.formats import PIECE
from surgery.weights.live import Undo, targets
from surgery.weights.progress import Progress, Tally
from surgery.weights.sources import Anchor, check_pair, flat, label, ranges, same_heads
from surgery.weights.streams import Workspace, in_parallel
from surgery.weights.vector_file import identity

if TYPE_CHECKING:
    from surgery.weights.apply import Applied
    from surgery.weights.vector import TaskVector

Places = Mapping[str, Tensor | None]


def between(
    base: Any,
    tuned: Any,
    mode: Mode = "set",
    *,
    only: Any = None,
    dtype: str | None = None,
    method: str = "difference",
    parameters: Mapping[str, Any] | None = None,
    missing: str = "error",
    threads: int = 2,
    progress: Progress | None = None,
) -> SparseDelta:
    """The numbers of `tuned` that differ from `base` in their bits, in one streamed walk through both.

    A tensor that moved so widely that it is smaller whole (from a third on in 16 bits, a half in 32) is kept whole.
    `only`: a `surgery.tuning.Selection`, or its dictionary of positions: other numbers are left out though they
    differ, and `parameters["outside"]` says how many did. `dtype`: type of the values in mode "add" (float32).
    `method` and `parameters` are noted in the file. A base of another type is brought into the tuned one first.
    Raises `SurgeryError` for models that do not belong together, and for changes that are NaN or infinite.
    """
    if mode not in ("set", "add"):
        raise SurgeryError(f"mode is '{mode}'; it can be 'set' (the tuned numbers) or 'add' (the differences).")
    if dtype is not None and mode == "set":
        raise SurgeryError("Mode 'set' keeps the tuned model's own bits, so it takes no dtype.", hint="Use mode='add'.")
    base, tuned = opened(base), opened(tuned)
    if Path(base.path) == Path(tuned.path):
        raise SurgeryError(f"Base and tuned model are the same: {base.path}.", hint="Name two different models.")
    own, about = base.tensors, identity(label(base), header_hash(base), base, {})
    base, tuned = same_heads(base, tuned)
    check_pair(base, tuned, missing)
    names = [n for n, info in base.tensors.items() if n in tuned.tensors and info.is_float]
    places = _selected(only, {n: base.tensors[n].shape for n in names})
    total = sum(info.numel for info in own.values() if info.is_float)
    tally = Tally(progress, sum(base.tensors[n].nbytes for n in names))
    found: dict[str, tuple[Entry, str, int]] = {}

    def work(name: str, _: Workspace) -> None:
        if places is None or name in places:
            found[name] = _moved(base, tuned, name, None if places is None else places[name])
        tally.add(name, base.tensors[name].nbytes)

    in_parallel(sorted(names, key=lambda n: -base.tensors[n].numel), work, threads=threads)
    new = {n for n in names if n not in own or base.tensors[n].dtype != tuned.tensors[n].dtype}  # never as they were
    kept = {n: found[n] for n in names if n in found and (found[n][0].count or (n in new and mode == "set"))}
    noted = dict(parameters or {})
    if outside := sum(left for _, _, left in found.values()):
        noted["outside"] = outside
    if only is not None and method == "difference" and isinstance(getattr(only, "method", None), str):
        method = only.method or method
    entries = {n: entry for n, (entry, _, _) in kept.items()}
    delta = SparseDelta(entries, "set", about, {n: s for n, (_, s, _) in kept.items()}, total,
                        f"{label(tuned)} - {label(base)}", {n: base.tensors[n].dtype for n in kept}, method, noted,
                        source=base)  # fmt: skip
    return delta if mode == "set" else _subtracted(delta, base, dtype or "float32")


def _selected(only: Any, shapes: Mapping[str, tuple[int, ...]]) -> Places | None:
    if only is None:
        return None
    places: Places = getattr(only, "places", only)
    claimed = getattr(only, "shapes", {})
    for name in places:
        if name not in shapes or tuple(claimed.get(name, shapes[name])) != shapes[name]:
            found = "have no such tensor" if name not in shapes else f"have {list(shapes[name])}"
            raise SurgeryError(f"The selection is of another model: for '{name}' these {found}.",
                               hint="Select with the model that was tuned.")  # fmt: skip
    return places


def _moved(base: Source, tuned: Source, name: str, inside: Tensor | None) -> tuple[Entry, str, int]:
    """What moved in one tensor, the checksum of the base's, and how many numbers moved outside `inside`."""
    info, shape = tuned.tensors[name], tuned.tensors[name].shape
    numel, outside, count = info.numel, 0, 0
    places: list[Tensor] = []
    values: list[Tensor] = []
    checksum = Checksum()
    for start, stop in ranges(numel, PIECE):
        before, after = flat(base, name, start, stop), flat(tuned, name, start, stop).contiguous()
        checksum.update(before)
        differs = storage_bits(before.to(after.dtype)) != storage_bits(after)
        at = differs.nonzero().view(-1)
        numbers = after[at]
        if inside is not None:
            mask = members(at + start, inside)
            outside += int((~mask).sum())
            at, numbers = at[mask], numbers[mask]
        if not bool(torch.isfinite(numbers).all()):
            raise SurgeryError(f"{tuned.path}: tensor '{name}' has values that are NaN or infinite.",
                               hint="Repair that checkpoint first.")  # fmt: skip
        count += at.numel()
        if inside is not None or not smaller_whole(count, numel, info.dtype):
            places.append(at.add_(start))
            values.append(numbers)
    if inside is None and smaller_whole(count, numel, info.dtype):
        return Entry(shape, None, flat(tuned, name, 0, numel)), checksum.hexdigest(), 0
    return joined(shape, places, values, torch_dtype(info.dtype)), checksum.hexdigest(), outside


def of_vector(vector: TaskVector, *, dtype: str = "float32", method: str = "vector", threads: int = 2) -> SparseDelta:
    """The numbers of a vector that are not zero, in mode "add": for vectors that are sparse by their making.

    As in `SparseDelta.of(TaskVector.between(base, tuned).sparsified(0.05))`. The base is as known as the vector's.
    """
    expression, kind = vector.expression, torch_dtype(dtype_code(dtype))
    found: dict[str, Entry] = {}

    def work(name: str, _: Workspace) -> None:
        shape = expression.shapes[name]
        places, values = [], []
        for start, stop in ranges(math.prod(shape)):
            numbers = expression.flat(name, start, stop).to(kind)
            at = numbers.nonzero().view(-1)
            values.append(numbers[at])
            places.append(at.add_(start))
        found[name] = joined(shape, places, values, kind)

    in_parallel(list(expression.shapes), work, threads=threads)
    entries = {name: found[name] for name in expression.shapes if found[name].count}
    anchors = expression.anchors()
    anchor = anchors[0] if len(anchors) == 1 else None
    about, sums, total = None, {}, sum(math.prod(s) for s in expression.shapes.values())
    if anchor is not None:
        about = identity(anchor.name, anchor.header, anchor.source, anchor.about)
        sums = {name: s for name in entries if (s := anchor.checksum(name)) is not None}
    source = None if anchor is None else anchor.source
    types = {} if source is None else {n: source.tensors[n].dtype for n in entries if n in source.tensors}
    return SparseDelta(entries, "add", about, sums, total, str(vector), types, method, source=source)


def added(delta: SparseDelta, base: Any = None, dtype: str = "float32") -> SparseDelta:
    """`delta` in mode "add": tuned - base at its positions, in float32 (float64 if one is), rounded to `dtype`.

    Raises `SurgeryError` where the base is not at hand, or has other numbers than the delta's.
    """
    if delta.mode == "add":
        return delta
    if base is not None:
        delta = delta.bound(base)
    return _subtracted(delta, checked_base(delta), dtype)


def _subtracted(delta: SparseDelta, source: Source, dtype: str) -> SparseDelta:
    kind = torch_dtype(dtype_code(dtype))
    entries: dict[str, Entry] = {}
    for name, entry in delta.entries.items():
        values = torch.empty(entry.count, dtype=kind)
        for a, places, tuned in entry.pieces():
            before = _gather(source, name, a, places, tuned.numel())
            wide = torch.float64 if torch.float64 in (before.dtype, tuned.dtype) else torch.float32
            values[a : a + tuned.numel()] = tuned.to(wide) - before.to(wide)
        if not bool(torch.isfinite(values).all()):
            raise SurgeryError(f"Tensor '{name}' of {delta.definition} has differences that are no {dtype} numbers.")
        entries[name] = entry.with_values(values)
    return replace(delta, entries=entries, mode="add")


def checked_base(delta: SparseDelta) -> Source:
    """The base of a delta, its touched tensors compared by checksum if it was not there when the delta was made."""
    if delta.source is None:
        raise SurgeryError(
            f"{delta.definition} keeps the tuned model's numbers; to read differences its base is needed.",
            hint="Name it: --base BASE, in Python base=BASE.",
        )
    anchor = Anchor.of(delta.source)
    for name, known in delta.checksums.items():
        if anchor.checksum(name) != known:
            raise SurgeryError(
                f"{delta.source.path} is not the base of {delta.definition}: tensor '{name}' has other numbers there.",
                hint="Name the base that the delta was extracted from.",
            )
    return delta.source


def _gather(source: Source, name: str, first: int, places: Tensor | None, count: int) -> Tensor:
    """The numbers of a source at ascending positions (None: `count` from `first` on), reading what lies between."""
    if places is None:
        return flat(source, name, first, first + count)
    low, high = int(places[0]), int(places[-1]) + 1
    return flat(source, name, low, high)[places.long() - low]


# ---- the way back on disk ------------------------------------------------------------------------------------------


def apply_with_undo(
    vector: TaskVector, base: Any, out: str | Path, *, undo: str | Path | None, force: bool = False, **options: Any
) -> Applied:
    """`vector.apply`, and the delta from the output back to the base written to `undo`."""
    if undo is not None:
        check_target(Path(undo).expanduser(), force=force)
    source = opened(base)
    applied = vector.apply(source, out, force=force, **options)
    if undo is not None:
        between(out, source, method="undo", parameters={"of": str(vector)}).save(undo, force=force)
    return applied


def reverse(delta: SparseDelta, tuned: Source, base: Source | None) -> SparseDelta:
    """From `tuned`, which must hold the delta, back to the base's numbers at its positions (mode "set")."""
    source = checked_base(replace(delta, source=None) if base is None else delta.bound(base))
    entries: dict[str, Entry] = {}
    sums: dict[str, str] = {}
    anchor = Anchor.of(tuned)
    for name, entry in delta.entries.items():
        info = tuned.tensors.get(name)
        if info is None or info.shape != entry.shape:
            raise SurgeryError(f"{tuned.path} does not hold {delta.definition}: it has no '{name}' of that shape.")
        back, odd = torch.empty(entry.count, dtype=torch_dtype(info.dtype)), 0
        for a, places, values in entry.pieces():
            before = _gather(source, name, a, places, values.numel())
            after = _gather(tuned, name, a, places, values.numel())
            wanted = values if delta.mode == "set" else summed(before, values, 1.0, after.dtype)
            odd += int((wanted.to(after.dtype) != after).sum())
            back[a : a + values.numel()] = before
        if odd:
            raise SurgeryError(
                f"{tuned.path} does not hold {delta.definition}: {odd:,} of the {entry.count:,} numbers that it moves "
                f"in '{name}' are others there.",
                hint="It can be taken out only of a model that it was put into, and that kept it.",
            )
        entries[name], sums[name] = entry.with_values(back), str(anchor.checksum(name))
    about = identity(anchor.name, anchor.header, tuned, {})
    types = {name: tuned.tensors[name].dtype for name in entries}
    text = f"-({delta.definition})"
    return SparseDelta(entries, "set", about, sums, delta.total, text, types, "reversed", source=tuned)


def summed(before: Tensor, values: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """before + scale * values in float32 (float64 on float64), rounded once to `dtype`."""
    work = torch.float64 if before.dtype == torch.float64 else torch.float32
    return values.to(work, copy=True).mul_(scale).add_(before.to(work)).to(dtype)


# ---- models in memory ----------------------------------------------------------------------------------------------


def put_into(delta: SparseDelta, model: nn.Module, scale: float, transfer: bool) -> Undo:
    """See `SparseDelta.apply_to`."""
    if not math.isfinite(scale):
        raise SurgeryError(f"The scale is {scale}; a finite number is needed.")
    undo = Undo()
    try:
        for name, tensor in targets(delta.vector().expression, model):
            if delta.mode == "set" and not transfer:
                _same(delta, name, tensor)
            entry, whole = delta.entries[name], tensor.view(-1)
            old = entry.of(whole)
            values = entry.values.to(tensor.device)
            if delta.mode == "add":
                new = summed(old, values, scale, tensor.dtype)
            elif scale == 1:
                new = values.to(tensor.dtype)
            else:
                work = torch.float64 if tensor.dtype == torch.float64 else torch.float32
                new = summed(old, values.to(work) - old.to(work), scale, tensor.dtype)
            if not bool(torch.isfinite(new).all()):
                raise SurgeryError(f"{delta.definition} gives values in '{name}' beyond {tensor.dtype}.")
            undo.put(tensor, entry.places, old, new)
    except BaseException:
        undo()
        raise
    return undo


def _same(delta: SparseDelta, name: str, tensor: Tensor) -> None:
    """Raises `SurgeryError` unless a tensor is the base's: as it is stored, or widened when it was loaded."""
    known = delta.checksums.get(name)
    stored = torch_dtype(delta.types.get(name, dtype_code(str(tensor.dtype))))
    narrow = tensor.to(stored)
    if known is None or (tensor_checksum(narrow) == known and bool((narrow.to(tensor.dtype) == tensor).all())):
        return
    raise SurgeryError(
        f"The model's '{name}' ({str(tensor.dtype).removeprefix('torch.')}) is not that of the base of "
        f"{delta.definition}, {(delta.base or {}).get('name')}: a delta of mode 'set' replaces the base's numbers.",
        hint="Load that base, in the type of its file or a wider one; or put it there all the same: transfer=True.",
    )
