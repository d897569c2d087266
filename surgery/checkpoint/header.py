"""The header of a safetensors file: 8 bytes of length, JSON, then the tensors without holes.

Files come from strangers: everything is checked against the size of the file before memory is taken.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
"""Storage types that hold plain numbers: those that arithmetic is offered for. 8-bit floats need scales."""

_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as a header describes it; `file` and `offset` (bytes from the start of the file) say where it is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path | None = field(default=None, compare=False)
    offset: int = field(default=0, compare=False)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    @property
    def rows(self) -> int:
        """Length of dimension 0 (1 for a scalar): the unit in which tensors are read and written."""
        return self.shape[0] if self.shape else 1

    @property
    def cols(self) -> int:
        """Elements in one row."""
        return math.prod(self.shape[1:])


def torch_dtype(code: str) -> torch.dtype:
    """The torch type of a safetensors code: `"BF16"` is `torch.bfloat16`."""
    import torch

    return getattr(torch, _TORCH_NAMES[code])


def dtype_code(name: str) -> str:
    """The safetensors code of a type named as users write it: `"bfloat16"`, `"bf16"`, `"torch.bfloat16"`, `"BF16"`."""
    plain = str(name).removeprefix("torch.").lower()
    short = {"bf16": "BF16", "fp16": "F16", "half": "F16", "fp32": "F32", "float": "F32", "fp64": "F64"}
    codes = short | {v: k for k, v in _TORCH_NAMES.items()} | {k.lower(): k for k in _TORCH_NAMES}
    if plain not in codes:
        raise SurgeryError(f"'{name}' is not a type of number.", hint="Use float32, bfloat16, float16 or float64.")
    return codes[plain]


def torch_name(code: str) -> str:
    """How `config.json` spells a safetensors code: `"BF16"` is `"bfloat16"`."""
    return _TORCH_NAMES[code]


@dataclass(frozen=True)
class Header:
    """What one file holds: its tensors in the order of their bytes, and its `__metadata__`."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """The checked header of the safetensors file `path`; no tensor is read.

    Raises `SurgeryError` for whatever is not a whole safetensors file: too short, a length beyond the file or over
    100 MB, broken JSON, unknown types, offsets that overlap, leave holes or point outside.
    """
    path = Path(path)
    again = "The file is damaged or was not downloaded whole: fetch it again."
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            if len(head) < 8:
                raise SurgeryError(f"{path} is not a safetensors file: it has only {size} bytes.", hint=again)
            (length,) = struct.unpack("<Q", head)
            if length > MAX_HEADER_BYTES:
                raise SurgeryError(
                    f"{path} claims a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are allowed.",
                    hint="It is not a safetensors file, or a hostile one.",
                )
            if length > size - 8:
                raise SurgeryError(f"{path} is cut off: header of {length:,} bytes, file of {size:,}.", hint=again)
            text = file.read(length)
    except OSError as error:
        raise SurgeryError(f"{path} can't be read: {error.strerror}.") from error
    try:
        raw = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise SurgeryError(f"{path} has a broken header: {error}.", hint=again) from error
    if not isinstance(raw, dict):
        raise SurgeryError(f"{path} has a broken header: a JSON object was expected.", hint=again)
    metadata = raw.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise SurgeryError(f"{path} has a broken header: `__metadata__` must map strings to strings.", hint=again)
    start = 8 + length
    entries = [_entry(path, name, value, start) for name, value in raw.items()]
    entries.sort(key=lambda e: (e.offset, e.nbytes))
    position = start
    for info in entries:
        if info.offset != position:
            what = "overlaps the tensor before it" if info.offset < position else "leaves a hole before it"
            raise SurgeryError(f"{path}: tensor '{info.name}' {what} (byte {info.offset - start:,}).", hint=again)
        position += info.nbytes
    if position != size:
        what = "is cut off" if position > size else "has bytes that belong to no tensor"
        raise SurgeryError(f"{path} {what}: {position:,} bytes expected, {size:,} found.", hint=again)
    return Header({e.name: e for e in entries}, metadata)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _entry(path: Path, name: str, value: Any, start: int) -> TensorInfo:
    """One tensor of a raw header; `start` is where the data begins in the file."""
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise SurgeryError(f"{path} has a tensor whose name is no text: {name!r}.")
    where = f"{path}: tensor '{name}'"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise SurgeryError(f"{where} needs exactly dtype, shape and data_offsets.")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise SurgeryError(f"{where} has the unknown type {dtype!r}.", hint="Known: " + ", ".join(ITEM_BYTES) + ".")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise SurgeryError(f"{where} has a shape that is not a list of sizes.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise SurgeryError(f"{where} has data_offsets that are not two sizes.")
    info = TensorInfo(name, dtype, tuple(shape), path, start + offsets[0])
    if offsets[1] - offsets[0] != info.nbytes:
        found = offsets[1] - offsets[0]
        raise SurgeryError(f"{where} is {info.nbytes:,} bytes by its shape, {found:,} by its offsets.")
    return info


def encode_header(
    tensors: Iterable[TensorInfo], metadata: dict[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """A header for `tensors` in their order, and each tensor's offset in bytes from the start of the file.

    Padded with spaces so that the data start on a multiple of 8. `metadata` gets the `format: pt` that transformers
    wants.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    position, relative = 0, {}
    for info in tensors:
        end = position + info.nbytes
        entries[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, end]}
        relative[info.name], position = position, end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: start + offset for name, offset in relative.items()}
