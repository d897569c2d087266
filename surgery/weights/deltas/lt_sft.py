"""LT-SFT's `pytorch_diff.bin`: a pickle, read as plain numbers only, and its way of counting positions.

Their writer puts NumPy numbers among the steps (the first position is one), which torch's reader of plain tensors
refuses. Two small classes stand in for NumPy's here: whatever the file says, nothing but an integer is made.
Format: `src/sft/sft.py` of cambridgeltl/composable-sft (the keys `body` and `head` are those of its first version).
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.checkpoint import CheckpointWriter, Source, TensorInfo
from surgery.checkpoint.reader import SINGLE
from surgery.errors import SurgeryError
from surgery.weights.deltas.entries import LONG, MOST, Entry
from surgery.weights.deltas.file import SparseDelta
from surgery.weights.deltas.peer import PEERS, Converted, Peer, record, sorted_entry
from surgery.weights.sources import flat

DIFF = "pytorch_diff.bin"
Steps = tuple[tuple[int, ...], Tensor, Tensor]
"""Shape, positions with the first dimension fastest (ascending, int64), values."""


@PEERS.register("lt-sft")
class LtSft(Peer):
    """Composable SFT's `pytorch_diff.bin`: flat positions with the first dimension fastest, as steps between them."""

    name = "lt-sft"

    def finds(self, path: Path) -> bool:
        return path.suffix == ".bin" and path.is_file() or (path / DIFF).is_file()

    def read(self, path: Path, base: Source | None, *, allow_pickle: bool = False) -> SparseDelta:
        file = path / DIFF if path.is_dir() else path
        if not allow_pickle:
            raise SurgeryError(
                f"{file} is a pickle, which can run code when it is loaded.",
                hint="Pass --allow-pickle (in Python allow_pickle=True): it is then read as plain numbers, and nothing "
                "in it is run.",
            )
        diffs, whole = load_pickle(file)
        entries: dict[str, Entry] = {}
        for name, found in diffs.items():
            if isinstance(found, Tensor):
                entries[name] = Entry(tuple(found.shape), None, found.reshape(-1))
                continue
            shape, places, values = found
            entries[name] = sorted_entry(str(file), name, shape, row_major(places, shape), values)
        if whole and base is None:
            raise SurgeryError(
                f"{file} also holds whole tensors ({', '.join(list(whole)[:3])}), which are no differences.",
                hint="Name the base, so that they can be made so: --base BASE, in Python base=BASE.",
            )
        for name, tensor in whole.items():
            info = None if base is None else base.tensors.get(name)
            if base is None or info is None or info.shape != tuple(tensor.shape):
                raise SurgeryError(f"{file} holds '{name}' {list(tensor.shape)}, which the base has not, or otherwise.")
            values = tensor.reshape(-1).float() - flat(base, name, 0, info.numel).float()
            entries[name] = Entry(info.shape, None, values)
        return record(path, entries, base, "lt-sft", whole=sorted(whole))

    def write(self, delta: SparseDelta, out: Path, *, force: bool = False) -> Converted:
        """`out` is a folder (their loader wants one) or a file that ends in .bin."""
        diffs: dict[str, Any] = {}
        for name, entry in delta.entries.items():
            if entry.places is None:
                diffs[name] = entry.values.reshape(entry.shape).clone()
                continue
            if entry.numel >= LONG:
                raise SurgeryError(f"Tensor '{name}' has {entry.numel:,} numbers: LT-SFT's reader counts to 2**31.")
            places, order = first_fastest(entry.places.long(), entry.shape).sort()
            steps = torch.diff(places, prepend=places.new_zeros(1)) if places.numel() else places
            diffs[name] = {"size": torch.Size(entry.shape), "index_steps": steps.tolist(),
                           "values": entry.values[order]}  # fmt: skip
        content = {"diffs": diffs, "abs": {}}
        if out.suffix == ".bin":
            out.parent.mkdir(parents=True, exist_ok=True)
            partial = out.with_name(f".{out.name}.partial")
            torch.save(content, partial)
            os.replace(partial, out)
        else:
            with CheckpointWriter(out, [TensorInfo("none", "U8", (1,))], force=force) as writer:
                writer.write("none", torch.zeros(1, dtype=torch.uint8))
                torch.save(content, writer.folder / DIFF)
                (writer.folder / SINGLE).unlink()
        return Converted(out, delta.count)


# ---- the pickle ----------------------------------------------------------------------------------------------------


class _Type:
    """Stands in for `numpy.dtype`: remembers its name and byte order."""

    def __init__(self, name: Any = "", *_: Any) -> None:
        self.name, self.order = str(name), "<"

    def __setstate__(self, state: Any) -> None:
        self.order = str(state[1])


def _number(kind: Any, raw: Any = b"") -> int:
    """Stands in for NumPy's maker of scalars: integers of eight or four bytes, nothing else."""
    if not isinstance(kind, _Type) or kind.name not in ("i8", "i4") or not isinstance(raw, bytes):
        raise ValueError("a number that is no integer")
    return int.from_bytes(raw, "big" if kind.order == ">" else "little", signed=True)


_SAFE: list[Any] = [
    (_number, "numpy._core.multiarray.scalar"), (_number, "numpy.core.multiarray.scalar"), (_Type, "numpy.dtype"),
]  # fmt: skip


def load_pickle(file: Path) -> tuple[dict[str, Steps | Tensor], dict[str, Tensor]]:
    """(differences, whole tensors) of a `pytorch_diff.bin`, all sizes and positions checked.

    Raises `SurgeryError` for whatever is not such a file; nothing in it is run.
    """
    try:
        with torch.serialization.safe_globals(_SAFE):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling hostile or foreign files fails in many ways
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise SurgeryError(f"{file} can't be read as plain numbers: {why}",
                           hint="Nothing in it was run.") from error  # fmt: skip
    if not isinstance(content, dict) or not {"diffs", "body"} & content.keys():
        raise SurgeryError(f"{file} is no file of LT-SFT: it has no 'diffs'.")
    if content.get("block_sparses"):
        raise SurgeryError(f"{file} holds block-sparse layers, which have no place in a delta.")
    diffs = content.get("diffs", content.get("body"))
    whole = content.get("abs", content.get("head")) or {}
    if not isinstance(diffs, dict) or not isinstance(whole, dict):
        raise SurgeryError(f"{file}: 'diffs' and 'abs' must map names to tensors.")
    found: dict[str, Steps | Tensor] = {}
    for name, value in diffs.items():
        found[str(name)] = _plain(file, name, value) if isinstance(value, Tensor) else _decoded(file, str(name), value)
    return found, {str(name): _plain(file, name, value) for name, value in whole.items()}


def _plain(file: Path, name: Any, value: Any) -> Tensor:
    if isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point():
        return value
    raise SurgeryError(f"{file}: '{name}' is no plain tensor of numbers.")


def _decoded(file: Path, name: str, value: Any) -> Steps:
    """One encoded tensor. Steps are summed in int64: their own reader's int32 overflows beyond 2**31 numbers."""
    try:
        shape, steps, values = tuple(value["size"]), value["index_steps"], value["values"]
        whole = all(type(n) is int and n >= 0 for n in shape) and isinstance(steps, (list, Tensor))
    except (KeyError, TypeError):
        raise SurgeryError(f"{file}: '{name}' needs size, index_steps and values.") from None
    numel = math.prod(shape) if whole else 0
    if not whole or numel >= MOST or not isinstance(values, Tensor) or not len(steps) == values.numel() <= numel:
        raise SurgeryError(f"{file}: '{name}' has a size, steps and values that do not fit each other.")
    values = _plain(file, name, values).reshape(-1)
    if isinstance(steps, list) and not all(type(step) is int for step in steps):
        raise SurgeryError(f"{file}: the steps of '{name}' are no whole numbers.")
    try:
        places = torch.as_tensor(steps, dtype=torch.int64).reshape(-1).cumsum(0)
    except (ValueError, RuntimeError, OverflowError):
        raise SurgeryError(f"{file}: the steps of '{name}' are no whole numbers.") from None
    if places.numel() and (
        int(places[0]) < 0 or not bool((places[1:] > places[:-1]).all()) or int(places[-1]) >= numel
    ):  # a sum that wraps round goes back, too
        raise SurgeryError(f"{file}: the steps of '{name}' go back, stand still, or leave its {numel:,} numbers.")
    return shape, places, values


def row_major(places: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Positions with the first dimension fastest as positions with the last one fastest; int64, in the same order."""
    out, stride = torch.zeros_like(places), math.prod(shape)
    for size in shape:
        stride //= max(1, size)
        out += places % max(1, size) * stride
        places = places // max(1, size)
    return out


def first_fastest(places: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The way back from `row_major`."""
    return row_major(places, tuple(reversed(shape)))
