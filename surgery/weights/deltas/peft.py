"""PEFT's sparse adapters, SHiRA and Super-Tuning, as sparse deltas and back. See formats.py."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgery.anatomy import kind_of
from surgery.checkpoint import CheckpointWriter, Source, TensorInfo, open_checkpoint
from surgery.checkpoint.adapter import CONFIG
from surgery.checkpoint.header import dtype_code
from surgery.checkpoint.reader import SINGLE, read_json
from surgery.errors import SurgeryError
from surgery.weights.adapters import CONV1D, PREFIX
from surgery.weights.deltas.entries import LONG, Entry, place_type
from surgery.weights.deltas.file import SparseDelta
from surgery.weights.deltas.peer import PEERS, Converted, Peer, record, sorted_entry

WEIGHTS = "adapter_model.safetensors"


class PeftPeer(Peer):
    """A PEFT folder of sparse matrices: the entries of a matrix are two tensors beside its module."""

    peft_type: ClassVar[str]
    parts: ClassVar[tuple[str, str]]
    """How positions and values are called."""

    def places(self, stored: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Flat row-major positions, int64."""
        raise NotImplementedError

    def stored(self, places: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The positions as they are stored, int32."""
        raise NotImplementedError

    def counts(self, entries: dict[str, Entry]) -> tuple[dict[str, Any], dict[str, int]]:
        """What the config says, and how many entries each matrix has for it."""
        raise NotImplementedError

    def finds(self, path: Path) -> bool:
        return (path / CONFIG).is_file() and read_json(path / CONFIG).get("peft_type") == self.peft_type

    def read(self, path: Path, base: Source | None, *, allow_pickle: bool = False) -> SparseDelta:
        config = read_json(path / CONFIG)
        if base is None:
            known = config.get("base_model_name_or_path")
            raise SurgeryError(
                f"{path} does not say the shapes of its matrices, so its base is needed.",
                hint=f"Name it: --base BASE, in Python base=BASE (its own record says {known!r}).",
            )
        source = open_checkpoint(path / WEIGHTS)
        modules: dict[str, dict[str, TensorInfo]] = {}
        for key, info in source.tensors.items():
            module, _, part = key.removeprefix(PREFIX).rpartition(".")
            if part not in self.parts:
                raise SurgeryError(
                    f"{path}: '{key}' is no part of a plain {self.peft_type} adapter.",
                    hint="Merge it with PEFT (`merge_and_unload`), save the model and extract a delta.",
                )
            modules.setdefault(module, {})[part] = info
        entries: dict[str, Entry] = {}
        for module, found in modules.items():
            name = _base_name(base, f"{module}.weight", path)
            shape = base.tensors[name].shape
            places, values = (found.get(part) for part in self.parts)
            if places is None or values is None:
                missing = self.parts[0] if places is None else self.parts[1]
                raise SurgeryError(
                    f"{path}: '{module}' lacks its {missing}.",
                    hint="Save the adapter with its indices (save_precomputed_indices=True).",
                )
            if len(shape) != 2 or len(values.shape) != 1 or places.shape[-1:] != values.shape or not values.is_float:
                raise SurgeryError(f"{path}: '{module}' has positions {list(places.shape)} and values "
                                   f"{values.dtype} {list(values.shape)} for a matrix {list(shape)}.")  # fmt: skip
            where = self._whole_numbers(source.read(places.name), str(path), module)
            entries[name] = sorted_entry(str(path), name, shape, self.places(where, shape), source.read(values.name))
        return record(path, entries, base, self.name, r=config.get("r"), sparsity=config.get("sparsity"))

    @staticmethod
    def _whole_numbers(places: Tensor, where: str, module: str) -> Tensor:
        """Positions as int64: on Windows PEFT stores SHiRA's as float32."""
        numbers = places.long() if not places.is_floating_point() or bool(torch.isfinite(places).all()) else None
        if numbers is None or not bool((numbers == places).all()):
            raise SurgeryError(f"{where}: the positions of '{module}' are no whole numbers.")
        return numbers

    def write(self, delta: SparseDelta, out: Path, *, force: bool = False) -> Converted:
        conv1d = delta.source is not None and delta.source.config.get("model_type") in CONV1D
        fits = {n: e for n, e in delta.entries.items() if _is_linear(n, e) and e.count and not conv1d}
        left_out = [n for n, e in delta.entries.items() if n not in fits and e.count]
        if not fits:
            raise SurgeryError(
                f"No matrix of a linear layer moves in {delta.definition}: PEFT's {self.peft_type} has a place for "
                "nothing else."
            )
        said, counts = self.counts(fits)
        if sum(counts.values()) >= LONG or any(entry.numel >= LONG for entry in fits.values()):
            raise SurgeryError(
                f"As {self.name}, {delta.definition} would have {sum(counts.values()):,} numbers, or positions beyond "
                "2**31, which PEFT's int32 does not reach."
            )
        tensors: dict[str, Tensor] = {}
        for name, entry in fits.items():
            full = _filled(entry, counts[name])
            module = name.removesuffix(".weight")
            assert full.places is not None
            tensors[f"{PREFIX}{module}.{self.parts[0]}"] = self.stored(full.places.long(), entry.shape).int()
            tensors[f"{PREFIX}{module}.{self.parts[1]}"] = full.values.float()
        config = said | {
            "peft_type": self.peft_type, "task_type": "CAUSAL_LM", "inference_mode": True,
            "target_modules": [name.removesuffix(".weight") for name in fits], "init_weights": True,
            "base_model_name_or_path": None if delta.source is None else str(delta.source.path),
        }  # fmt: skip
        infos = [TensorInfo(n, dtype_code(str(t.dtype)), tuple(t.shape)) for n, t in tensors.items()]
        with CheckpointWriter(out, infos, shard_size=1 << 60, force=force) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            writer.add_file(CONFIG, json.dumps(config, indent=2) + "\n")
            (writer.folder / SINGLE).rename(writer.folder / WEIGHTS)
        kept = sum(entry.count for entry in fits.values())
        return Converted(out, kept, sum(counts.values()) - kept, left_out)


@PEERS.register("shira")
class Shira(PeftPeer):
    """PEFT's SHiRA: exactly r (m + n) entries in every matrix, one r for all."""

    name, peft_type, parts = "shira", "SHIRA", ("shira_indices", "shira_weight")

    def places(self, stored: Tensor, shape: tuple[int, ...]) -> Tensor:
        if stored.shape[:1] != (2,) or stored.ndim != 2:
            raise SurgeryError(f"SHiRA's positions are rows and columns, [2, K]; found {list(stored.shape)}.")
        rows, columns = stored
        if rows.numel() and (int(columns.min()) < 0 or int(columns.max()) >= shape[1]):
            raise SurgeryError(f"SHiRA's positions go beyond the {shape[1]} columns of a matrix.")
        return rows * shape[1] + columns

    def stored(self, places: Tensor, shape: tuple[int, ...]) -> Tensor:
        return torch.stack([places // shape[1], places % shape[1]])

    def counts(self, entries: dict[str, Entry]) -> tuple[dict[str, Any], dict[str, int]]:
        r = max(-(-entry.count // sum(entry.shape)) for entry in entries.values())
        counts = {name: r * sum(entry.shape) for name, entry in entries.items()}
        for name, entry in entries.items():
            if counts[name] > entry.numel:
                raise SurgeryError(
                    f"SHiRA would need r = {r} for its fullest matrix, which is more than '{name}' {list(entry.shape)} "
                    "has numbers.",
                    hint="Convert to supertuning, or make the delta sparser.",
                )
        return {"r": r, "mask_type": "random", "random_seed": 0}, counts


@PEERS.register("supertuning")
class SuperTuning(PeftPeer):
    """PEFT's Super-Tuning: int(m n (1 - sparsity)) entries in every matrix, one sparsity for all."""

    name, peft_type, parts = "supertuning", "SUPERTUNING", ("supertuning_indices", "supertuning_values")

    def places(self, stored: Tensor, shape: tuple[int, ...]) -> Tensor:
        if stored.ndim != 1:
            raise SurgeryError(f"Super-Tuning's positions are flat, [K]; found {list(stored.shape)}.")
        return stored

    def stored(self, places: Tensor, shape: tuple[int, ...]) -> Tensor:
        return places

    def counts(self, entries: dict[str, Entry]) -> tuple[dict[str, Any], dict[str, int]]:
        sparsity = 1 - max(entry.count / entry.numel for entry in entries.values())
        while any(int(e.numel * (1 - sparsity)) < e.count for e in entries.values()):
            sparsity = math.nextafter(sparsity, -1) if sparsity > 0 else 0.0  # one ulp lower, until nobody is cut
        counts = {name: int(entry.numel * (1 - sparsity)) for name, entry in entries.items()}
        return {"sparsity": sparsity, "select_top": True, "save_precomputed_indices": True, "r": None}, counts


def _is_linear(name: str, entry: Entry) -> bool:
    return len(entry.shape) == 2 and name.endswith(".weight") and kind_of(name) != "embedding"


def _filled(entry: Entry, count: int) -> Entry:
    """The entry with zeros at its lowest free positions, up to `count`."""
    places = torch.arange(entry.numel) if entry.places is None else entry.places.long()
    more = count - places.numel()
    free = torch.ones(places.numel() + more, dtype=torch.bool)
    free[places[places < free.numel()]] = False
    new = free.nonzero().view(-1)[:more]
    both, order = torch.cat([places, new]).sort()
    values = torch.cat([entry.values, entry.values.new_zeros(more)])[order]
    return Entry(entry.shape, both.to(place_type(entry.numel)), values)


def _base_name(base: Source, name: str, path: Path) -> str:
    """The base's own name: some checkpoints lack, or add, a common prefix."""
    near = [known for known in base.tensors if name.endswith(f".{known}") or known.endswith(f".{name}")]
    found = [name] if name in base.tensors else near
    if len(found) != 1:
        raise SurgeryError(f"{path} was made for another base: {base.path} has no tensor '{name}'.")
    return found[0]
