"""Who is who and where it came from: fingerprints of checkpoints, and the record `surgery.json` beside the weights.

Inputs are recorded under the names the user gave them, and identified by what they hold.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import surgery
from surgery.checkpoint.reader import Checkpoint, Source, read_json
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from torch import Tensor

RECORD = "surgery.json"
SCHEMA = 1
CHECKSUM_BLOCK = 8 << 20


class Checksum:
    """xxh3_128 of a tensor's bytes as they are stored, fed in rows; the portions do not matter. Not cryptographic."""

    def __init__(self) -> None:
        import xxhash

        self._hash = xxhash.xxh3_128()

    def update(self, rows: Tensor | memoryview) -> None:
        if isinstance(rows, memoryview):
            self._hash.update(rows)
        elif rows.numel():
            import torch

            flat = rows.detach().cpu().contiguous().view(-1).view(torch.uint8)
            self._hash.update(flat.numpy())  # type: ignore[arg-type]

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def tensor_checksum(rows: Tensor | Iterable[Tensor]) -> str:
    """xxh3_128 (hex) of a tensor given whole or as blocks of rows in their order."""
    import torch

    checksum = Checksum()
    for block in [rows] if isinstance(rows, torch.Tensor) else rows:
        checksum.update(block)
    return checksum.hexdigest()


def header_hash(source: Source) -> str:
    """SHA-256 (hex) of all names, types and shapes: the same for every sharding of the same model."""
    facts = [[t.name, t.dtype, list(t.shape)] for _, t in sorted(source.tensors.items())]
    return hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode()).hexdigest()


def checksums(source: Source, threads: int = 2) -> dict[str, str]:
    """xxh3_128 of every tensor of `source`, read once in blocks of some MB."""

    def one(name: str) -> str:
        checksum = Checksum()
        if isinstance(source, Checkpoint):
            data = source.raw(name)
            for start in range(0, len(data), CHECKSUM_BLOCK):
                checksum.update(data[start : start + CHECKSUM_BLOCK])
        else:
            info = source.tensors[name]
            rows = max(1, CHECKSUM_BLOCK // max(1, info.nbytes // max(1, info.rows)))
            for start in range(0, info.rows, rows):
                checksum.update(source.read(name, start, start + rows))
        return checksum.hexdigest()

    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(source.tensors, pool.map(one, source.tensors), strict=True))


def fingerprint(source: Source, *, tensors: bool = False, threads: int = 2) -> dict[str, Any]:
    """What identifies `source`: the hash of its header, its files with their sizes and, if asked, every checksum."""
    files = {info.file for info in source.tensors.values() if info.file is not None}
    found: dict[str, Any] = {
        "header": header_hash(source),
        "files": {file.name: file.stat().st_size for file in sorted(files)},
        "parameters": sum(info.numel for info in source.tensors.values()),
        "dtypes": dict(Counter(info.dtype for info in source.tensors.values())),
    }
    return found | {"tensors": checksums(source, threads)} if tensors else found


def _versions() -> dict[str, str]:
    return {
        "surgery": surgery.__version__,
        "torch": importlib.metadata.version("torch"),  # asked of the installation: nothing is imported for it
        "python": platform.python_version(),
    }


def _now() -> str:
    epoch = os.environ.get("SOURCE_DATE_EPOCH")  # lets a rerun write the same bytes
    time = (
        datetime.datetime.now(datetime.UTC)
        if epoch is None
        else datetime.datetime.fromtimestamp(int(epoch), datetime.UTC)
    )
    return time.isoformat(timespec="seconds")


@dataclass
class Provenance:
    """The record beside the weights, `surgery.json`: enough to repeat the work and to check the inputs for it.

    `inputs` are dictionaries with `name` (as the user gave it), `role` (base, tuned, adapter, tokenizer, vector) and
    a `fingerprint`; `tensors` maps each tensor to its report, `totals` sums them up.
    """

    operation: str
    recipe: str | dict[str, Any] | None = None
    command: list[str] | None = None
    inputs: list[dict[str, Any]] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    totals: dict[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=_now)
    versions: dict[str, str] = field(default_factory=_versions)
    schema: int = SCHEMA

    def add_input(self, name: str | Path, role: str, source: Source | None = None, *, tensors: bool = False) -> None:
        """Records an input as the user named it, with its fingerprint (`tensors`: every checksum as well)."""
        known = {} if source is None else fingerprint(source, tensors=tensors)
        self.inputs.append({"name": str(name), "role": role} | known)

    def to_json(self) -> str:
        return json.dumps(plain(asdict(self)), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: str | Path) -> Provenance:
        """The record of a folder that this toolkit wrote. Raises `SurgeryError` when there is none."""
        path = Path(folder) / RECORD
        if not path.is_file():
            raise SurgeryError(f"{folder} has no {RECORD}: it was not written by this toolkit.")
        raw = read_json(path)
        names = {f.name for f in fields(cls)}
        if raw.get("schema") != SCHEMA or "operation" not in raw:
            raise SurgeryError(f"{path} is of schema {raw.get('schema')!r}; {SCHEMA} is understood here.")
        return cls(**{k: v for k, v in raw.items() if k in names})


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinity as words, since JSON has no signs for them."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    return plain(value.item()) if hasattr(value, "item") else str(value)
