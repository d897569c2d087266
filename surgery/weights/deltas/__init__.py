"""Sparse deltas: the few numbers that a fine-tuning moved; on disk, in models, added up, and as peers keep them.

    from surgery.weights.deltas import SparseDelta, overlap
    delta = SparseDelta.between("tiny-base", model)
    delta.save("chain.safetensors")

| to look for | file |
|---|---|
| `SparseDelta`, its file, and how it is a task vector like any other | `file.py` |
| one tensor's places and numbers | `entries.py` |
| taken out of models, put in, and reverted bit for bit | `extract.py` |
| several added up; how far they meet | `algebra.py` |
| `BASE+delta.safetensors` as a model | `source.py` |
| the formats of LT-SFT, SHiRA and Super-Tuning | `formats.py`; `peer.py`, `lt_sft.py`, `peft.py` |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.weights.deltas.algebra import compose as compose
    from surgery.weights.deltas.algebra import overlap as overlap
    from surgery.weights.deltas.file import SparseDelta as SparseDelta

_HOMES = {"SparseDelta": "file", "compose": "algebra", "overlap": "algebra"}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'surgery.weights.deltas' has no attribute '{name}'")
    return getattr(import_module(f"surgery.weights.deltas.{_HOMES[name]}"), name)
