"""Folders that are there whole or not at all, whenever the process or the power dies."""

from __future__ import annotations

import os
from pathlib import Path


def renamed(temporary: Path, folder: Path) -> None:
    """Brings a folder to the disk, then gives it its name."""
    for path in (*temporary.rglob("*"), temporary):
        _sync(path)
    os.replace(temporary, folder)
    _sync(folder.parent)


def reason(error: Exception) -> str:
    """What went wrong with the disk, in the system's words."""
    return getattr(error, "strerror", None) or str(error)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
