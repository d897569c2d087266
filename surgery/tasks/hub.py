"""Data sets from the hub, where there is one."""

from __future__ import annotations

from typing import Any

from surgery.errors import SurgeryError


def hub_rows(name: str, config: str | None = None, split: str = "train", *, hint: str = "") -> list[dict[str, Any]]:
    """All rows of a data set on the hub. Raises `SurgeryError` without `datasets`, a connection or such a data set."""
    from surgery.checkpoint.reader import hub_answers

    hint = hint or "Give a local file, or go online."
    try:
        from datasets import load_dataset
    except ImportError:
        raise SurgeryError(
            f"The data set '{name}' needs the package `datasets`.", hint="pip install datasets"
        ) from None
    if not hub_answers():
        raise SurgeryError(f"The data set '{name}' could not be loaded: the hub does not answer.", hint=hint)
    try:
        return [dict(row) for row in load_dataset(name, config, split=split)]
    except Exception as error:
        raise SurgeryError(f"The data set '{name}' could not be loaded ({type(error).__name__}).", hint=hint) from error
