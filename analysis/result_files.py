"""A result on disk: the values as safetensors, the labels and the rest as JSON beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from surgery.errors import SurgeryError


def write(path: str | Path, values: np.ndarray, text: Mapping[str, Any]) -> Path:
    """Write `path`.safetensors and `path`.json, each whole or not at all; returns the JSON's path."""
    from safetensors.numpy import save

    numbers, words = _files(path)
    words.parent.mkdir(parents=True, exist_ok=True)
    _write(numbers, save({"values": np.ascontiguousarray(values)}))
    _write(words, json.dumps(text, indent=1, default=_plain).encode())
    return words


def read(path: str | Path) -> tuple[np.ndarray, dict[str, Any]]:
    """What `write` wrote. Raises `SurgeryError` when a file is missing or is not a result."""
    from safetensors.numpy import load_file

    numbers, words = _files(path)
    try:
        text = json.loads(words.read_text(encoding="utf-8"))
        return load_file(numbers)["values"], {k: text[k] for k in ("axes", "name", "columns", "meta")}
    except FileNotFoundError as error:
        raise SurgeryError(f"No result at {path}: {error.filename or error} is missing.") from None
    except Exception as error:
        raise SurgeryError(f"{path} is not a saved result: {error}") from error


def _files(path: str | Path) -> tuple[Path, Path]:
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
    return stem.with_name(stem.name + ".safetensors"), stem.with_name(stem.name + ".json")


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _plain(thing: Any) -> Any:
    """NumPy scalars and arrays, paths: as JSON would have them."""
    convert: Callable[[], Any] | None = getattr(thing, "tolist", None)
    return convert() if convert else str(thing)
