"""Models as the weight space opens them: as `open_checkpoint` does, and `BASE+delta.safetensors` too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from surgery.checkpoint import Source, open_checkpoint


def open_model(spec: str | Path, **options: Any) -> Source:
    """`open_checkpoint(spec, **options)`; a base with a sparse delta put in where `spec` is `BASE+FILE.safetensors`.

    Raises `SurgeryError` for a file that is no sparse delta, and for a base that is not the delta's own.
    """
    base, plus, file = str(spec).rpartition("+")
    if plus and base and file.endswith(".safetensors") and not os.path.exists(os.path.expanduser(str(spec))):
        from surgery.weights.deltas.file import SparseDelta
        from surgery.weights.deltas.source import DeltaSource

        return DeltaSource(open_model(base, **options), SparseDelta.load(file))
    return open_checkpoint(spec, **options)
