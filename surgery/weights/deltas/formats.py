"""Sparse deltas in the formats of peers, in and out: one class for each.

| name        | where                           | what is stored                                                       |
|-------------|---------------------------------|----------------------------------------------------------------------|
| lt-sft      | `pytorch_diff.bin` (a pickle)   | `diffs`: size, index_steps, values; `abs`: whole tensors             |
| shira       | PEFT folder, type SHIRA         | `shira_indices` int32 [2, K], `shira_weight` [K]; K = r (m + n)      |
| supertuning | PEFT folder, type SUPERTUNING   | `supertuning_indices` int32 [K] (flat), `supertuning_values` [K]     |

All three keep differences, so what is read is of mode "add" and what is written is made so. PEFT's two give every
matrix as many entries as one number in the config says (r, or the sparsity), so the others are filled up with zeros,
and their files do not say the shapes: to read them the base is needed. PEFT itself is not. Sources: LT-SFT,
arXiv:2110.07560; SHiRA, arXiv:2406.13175; Super-Tuning, arXiv:2607.09287; formats as of PEFT 0.21.
The classes: lt_sft.py, peft.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgery.checkpoint.writer import check_target
from surgery.errors import SurgeryError
from surgery.weights.deltas import lt_sft, peft  # noqa: F401 (they register their formats)
from surgery.weights.deltas.file import SparseDelta, is_delta, opened
from surgery.weights.deltas.peer import PEERS, Converted


def read(path: str | Path, base: Any = None, *, allow_pickle: bool = False) -> SparseDelta:
    """A sparse delta from its own file or from a peer's; `base` where the format does not say the shapes.

    `allow_pickle` admits LT-SFT's files, read as plain tensors and numbers (`weights_only=True`). Raises
    `SurgeryError` for what is of none of the formats, damaged, or of another base.
    """
    path = Path(path).expanduser()
    if is_delta(path):
        return SparseDelta.load(path, base)
    for kind in PEERS.values():
        if kind().finds(path):
            delta = kind().read(path, None if base is None else opened(base), allow_pickle=allow_pickle)
            for name, entry in delta.entries.items():
                entry.check(str(path), name)
            return delta
    raise SurgeryError(
        f"{path} is no sparse delta that is known here.",
        hint="Give a delta, LT-SFT's pytorch_diff.bin, or a folder of PEFT's SHiRA or Super-Tuning.",
    )


def write(delta: SparseDelta, out: str | Path, to: str, base: Any = None, *, force: bool = False) -> Converted:
    """Writes a delta as `to` ("lt-sft", "shira", "supertuning", or "delta" for our own file).

    A delta of mode "set" needs its `base` for all but its own file. Raises `SurgeryError` when `out` exists without
    `force`, and when the format has a place for none of the tensors.
    """
    out = Path(out).expanduser()
    if to == "delta":
        return Converted(delta.save(out, force=force), delta.count)
    kind = PEERS.lookup(to)
    check_target(out, force=force)
    return kind().write(delta.added(base), out, force=force)
