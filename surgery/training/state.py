"""A run's state as tensors and JSON: half-used batches, random generators, and whether two recipes are one run."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.training.batch import Batch
from surgery.training.sources import Update

FREE = ("about", "checkpoint", "evaluate", "name", "output", "paper", "parallel", "trackers")
"""Keys of a recipe that do not change the weights (`parallel`: to float rounding)."""


def drawn_as_tensors(updates: list[Update]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Half-used batches: tensors by "update|kind|name", all else as JSON."""
    tensors: dict[str, Tensor] = {}
    words: list[dict[str, Any]] = []
    for i, update in enumerate(updates):
        entry: dict[str, Any] = {"optimizer": update.optimizer, "fresh": update.fresh, "batches": {}}
        for kind, batch in update.batches.items():
            fields = {k: v for k, v in vars(batch).items() if k != "columns"}
            entry["batches"][kind] = {k: v for k, v in fields.items() if not isinstance(v, Tensor)}
            parts = {k: v for k, v in fields.items() if isinstance(v, Tensor)}
            parts |= {f"columns.{name}": value for name, value in batch.columns.items()}
            tensors |= {f"{i}|{kind}|{name}": value for name, value in parts.items()}
        words.append(entry)
    return tensors, words


def undrawn(tensors: Mapping[str, Tensor], words: list[dict[str, Any]]) -> list[Update]:
    """The batches again."""
    updates = []
    for i, entry in enumerate(words):
        batches = {}
        for kind, plain in entry["batches"].items():
            mine = {k.split("|", 2)[2]: v for k, v in tensors.items() if k.startswith(f"{i}|{kind}|")}
            columns = {k.removeprefix("columns."): v for k, v in mine.items() if k.startswith("columns.")}
            parts: dict[str, Any] = {k: v for k, v in mine.items() if not k.startswith("columns.")}
            batches[kind] = Batch(**plain | parts, columns=columns)
        updates.append(Update(batches, entry["optimizer"], entry["fresh"]))
    return updates


def random_state() -> dict[str, Any]:
    """States of the global generators: nothing here draws from them, a plug-in or a dropout may."""
    version, keys, *rest = np.random.get_state()
    devices = []
    if torch.cuda.is_available():
        devices = [state.tolist() for state in torch.cuda.get_rng_state_all()]
    return {
        "python": random.getstate(),
        "numpy": [version, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "devices": devices,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Takes up where `random_state` was made."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["devices"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([torch.tensor(s, dtype=torch.uint8) for s in state["devices"]])


def same_recipe(before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = FREE) -> str | None:
    """Refuses to go on with another recipe, naming what differs; a remark when it is the number of steps.

    Both are plain JSON. Keys of `free` may differ. Raises `SurgeryError`.
    """
    old, new = _flat(before), _flat(now)
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k.split(".")[0] not in free]
    told = [f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in changed if key != "steps"]
    if told:
        raise SurgeryError(
            f"The run began with another recipe: {'; '.join(told[:3])}{'; ...' if len(told) > 3 else ''}.",
            hint="Undo the change, or begin a run in another folder.",
        )
    if "steps" in changed:
        return (
            f"The run began with {old['steps']} steps and goes on to {new['steps']}: from here on schedules are those "
            f"of a run of {new['steps']}."
        )
    return None


def _flat(words: Any, path: str = "") -> dict[str, Any]:
    """Nested dictionaries as {"a.b": value}; addresses of Python objects are no difference."""
    if isinstance(words, Mapping) and (words or not path):
        return {k: v for key, value in words.items() for k, v in _flat(value, f"{path}.{key}".lstrip(".")).items()}
    return {path: re.sub(r" at 0x[0-9a-f]+", "", words) if isinstance(words, str) else words}
