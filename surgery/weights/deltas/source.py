"""`BASE+delta.safetensors`: a base with a sparse delta put in, as a source for merges and differences."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.anatomy import output_head
from surgery.checkpoint import Source, TensorInfo
from surgery.checkpoint.adapter import tied_pair
from surgery.weights.deltas.extract import checked_base, summed
from surgery.weights.deltas.file import SparseDelta


class DeltaSource:
    """`base` with `delta` in it: the tuned model's own bits (mode "set"), or float32 sums not yet rounded ("add").

    Nothing is written or held but the delta. Raises `SurgeryError` when the touched tensors are not those of the
    delta's base, by checksum.
    """

    def __init__(self, base: Source, delta: SparseDelta) -> None:
        delta = delta.bound(base)
        self.base, self.delta = base, delta
        self._read = checked_base(delta)  # which has a head where the delta moves one
        self.path = Path(f"{base.path}+{delta.path}")
        self.config: dict[str, Any] = copy.deepcopy(base.config)
        self.tensors = dict(base.tensors)
        for name, entry in delta.entries.items():
            stored = self._read.tensors[name].dtype
            code = entry.code if delta.mode == "set" else "F64" if stored == "F64" else "F32"
            self.tensors[name] = TensorInfo(name, code, entry.shape, delta.path)
        if tied_pair(base) is not None and output_head(delta.shapes) is not None:
            for config in (self.config, *(v for v in self.config.values() if isinstance(v, dict))):
                if config is self.config or "tie_word_embeddings" in config:
                    config["tie_word_embeddings"] = False

    def __repr__(self) -> str:
        return f"DeltaSource({str(self.path)!r}, {len(self.delta)} of {len(self.tensors)} tensors touched)"

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start:stop` of dimension 0 of tensor `name`, with the delta."""
        rows = self._read.read(name, start, stop)
        entry = self.delta.entries.get(name)
        if entry is None:
            return rows
        first = slice(start, stop).indices(self.tensors[name].rows)[0] * self.tensors[name].cols
        flat = rows.reshape(-1)
        if self.delta.mode == "set":
            return entry.put(flat.to(entry.values.dtype, copy=True), first).view(rows.shape)
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        return summed(flat, entry.put(torch.zeros(flat.numel(), dtype=wide), first), 1.0, wide).view(rows.shape)
