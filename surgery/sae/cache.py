"""Activations on disk: read from the model once, for as many dictionaries as one likes.

    write(Stream(model, ["resid_post.2"], batches), "cache", dtype="bfloat16")
    cached = Cached("cache", models=model, tokenizer=tokenizer)     # refuses activations of other weights
    fit(entries, cached.batches(4096, seed=0), steps=10_000)

    cache/manifest.json              sites, widths, rows of every shard, and whose activations they are
    cache/rows-00000.safetensors     one tensor a site, (rows, width); memory-mapped when read

Shards end where a batch of text ends. A run that was interrupted goes on behind its last whole shard, without reading
the texts before it again; a full disk leaves what is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.activations.interventions import unwrapped
from surgery.checkpoint.disk import reason
from surgery.checkpoint.provenance import Checksum
from surgery.checkpoint.reader import open_checkpoint
from surgery.errors import SurgeryError
from surgery.sae.activations import Rows, Stream

VERSION = 1
MANIFEST = "manifest.json"


def identity(models: Iterable[nn.Module], tokenizer: Any = None) -> dict[str, Any]:
    """What tells models and their tokenizer from others: xxh3 of all weights, and of the tokenizer's description."""
    sums = []
    for model in models:
        checksum = Checksum()
        for _, parameter in sorted(unwrapped(model).named_parameters()):
            checksum.update(parameter)
        sums.append(checksum.hexdigest())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = None
    if backend is not None:
        checksum = Checksum()
        checksum.update(memoryview(backend.to_str().encode()))
        words = checksum.hexdigest()
    return {"weights": sums, "tokenizer": words}


def write(
    stream: Stream, folder: str | Path, *, shard_rows: int = 1 << 17, dtype: str = "float32",
    note: dict[str, Any] | None = None, force: bool = False,
) -> Path:  # fmt: skip
    """Reads all of `stream` into `folder`; `dtype` is float32, bfloat16 or float16. `note`: what else to say of it.

    The stream's `batches` are iterated over from the start when a run goes on. Raises `SurgeryError` when the folder
    exists without `force`, when what was begun there is of other activations, and for a stream without rows.
    """
    folder = Path(folder)
    kind = getattr(torch, dtype, None)
    if kind not in (torch.float32, torch.bfloat16, torch.float16):
        raise SurgeryError(f"Activations are not kept in {dtype}.", hint="float32, bfloat16 or float16.")
    if folder.exists() and not force:
        raise SurgeryError(f"{folder} exists.", hint="Choose another folder, or pass force=True.")
    partial = folder.with_name(f".{folder.name}.partial")
    about = {"kind": "activations", "version": VERSION, "sites": stream.names, "dtype": dtype, "note": note,
             "difference": stream.difference, "of": identity(stream.models, stream.tokenizer)}  # fmt: skip
    shards: list[dict[str, int]] = _begun(partial, about)
    seen = shards[-1]["batches"] if shards else 0
    held: list[Rows] = []
    many, number = 0, seen
    for rows in stream.after(seen):
        held.append(rows)
        many, number = many + len(next(iter(rows.values()))), number + 1
        if many >= shard_rows:
            _shard(partial, about, shards, held, kind, number)
            held, many = [], 0
    if many:
        _shard(partial, about, shards, held, kind, number)
    if not shards:
        raise SurgeryError("The stream has no rows to keep.", hint="Give it text.")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
    return folder


def _begun(partial: Path, about: dict[str, Any]) -> list[dict[str, int]]:
    """The whole shards of an interrupted run."""
    partial.mkdir(parents=True, exist_ok=True)
    manifest = partial / MANIFEST
    if not manifest.is_file():
        return []
    before = json.loads(manifest.read_text(encoding="utf-8"))
    shards: list[dict[str, int]] = before.pop("shards")
    if before != about:
        raise SurgeryError(f"What was begun in {partial} is of other activations.", hint="Remove that folder.")
    return shards


def _shard(
    partial: Path, about: dict[str, Any], shards: list[dict[str, int]], held: list[Rows], kind: torch.dtype, seen: int
) -> None:
    """Writes one shard, then says so in the manifest: whenever the process dies, what that names is whole."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {site: torch.cat([rows[site] for rows in held]).to(kind).cpu().contiguous() for site in held[0]}
    path = partial / f"rows-{len(shards):05d}.safetensors"
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary)
        os.replace(temporary, path)
        shards.append({"rows": len(next(iter(tensors.values()))), "batches": seen})
        manifest = partial / f".{MANIFEST}"
        manifest.write_text(json.dumps(about | {"shards": shards}, indent=1) + "\n", encoding="utf-8")
        os.replace(manifest, partial / MANIFEST)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise SurgeryError(f"{path.name} could not be written ({reason(error)}).",
                           hint="Make room and run again: whole shards are kept.") from error  # fmt: skip


class Cached:
    """A folder that `write` made. With `models` (and `tokenizer`) it is refused when it is of others.

    Raises `SurgeryError` for a folder that is none, damaged, or of a newer version.
    """

    def __init__(self, folder: str | Path, *, models: Any = None, tokenizer: Any = None) -> None:
        self.folder = Path(folder)
        try:
            words = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            kind, version, shards = words["kind"], words["version"], words["shards"]
            self.names: list[str] = words["sites"]
            self.of: dict[str, Any] = words["of"]
            self.note: dict[str, Any] | None = words.get("note")
        except (OSError, ValueError, KeyError) as error:
            raise SurgeryError(f"{folder} holds no activations: {error}.", hint="cache.write makes them.") from None
        if kind != "activations" or version > VERSION:
            raise SurgeryError(f"{folder} has version {version} of '{kind}'; this program reads {VERSION}.")
        self._parts: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for number, shard in enumerate(shards):
            source = open_checkpoint(self.folder / f"rows-{number:05d}.safetensors")
            for name in self.names:
                info = source.tensors.get(name)
                if info is None or len(info.shape) != 2 or info.shape[0] != shard["rows"]:
                    raise SurgeryError(f"Shard {number} of {folder} does not hold {shard['rows']} rows of '{name}'.",
                                       hint="It is damaged: write the activations again.")  # fmt: skip
                self._parts[name].append(source.read(name))
        self._ends = torch.tensor([shard["rows"] for shard in shards]).cumsum(0)
        if models is not None:
            self._check(list(models) if isinstance(models, (list, tuple)) else [models], tokenizer)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _check(self, models: list[nn.Module], tokenizer: Any) -> None:
        now = identity(models, tokenizer)
        if now["weights"] != self.of["weights"]:
            raise SurgeryError(f"{self.folder} holds activations of other weights.", hint="Write them again.")
        if None not in (now["tokenizer"], self.of["tokenizer"]) and now["tokenizer"] != self.of["tokenizer"]:
            raise SurgeryError(f"{self.folder} was read with another tokenizer.", hint="Write the activations again.")

    def rows(self, numbers: Tensor, sites: Iterable[str] | None = None) -> Rows:
        """Rows by number, float32."""
        shard = torch.searchsorted(self._ends, numbers, right=True)
        found: Rows = {}
        for name in sites or self.names:
            parts = self._parts[name]
            out = torch.empty(len(numbers), parts[0].shape[1])
            for which in shard.unique().tolist():
                mine = shard == which
                start = int(self._ends[which - 1]) if which else 0
                out[mine] = parts[which][numbers[mine] - start].float()
            found[name] = out
        return found

    def batches(
        self, size: int, *, seed: int = 0, epochs: int | None = None, begin: int = 0, sites: Iterable[str] | None = None
    ) -> Iterator[Rows]:
        """Batches of rows in random order, a new one in each epoch; without end when `epochs` is None.

        Rows that are fewer than a batch at an epoch's end wait for the next epoch's. The first `begin` batches are
        passed over, without reading them. Of `sites` alone, where some are named.
        """
        if not 0 < size <= len(self):
            raise SurgeryError(f"{len(self):,} rows give no batch of {size:,}.", hint="Take smaller batches.")
        generator = torch.Generator().manual_seed(seed)
        left, names = torch.zeros(0, dtype=torch.long), list(sites or self.names)
        epoch = number = 0
        while epochs is None or epoch < epochs:
            left = torch.cat([left, torch.randperm(len(self), generator=generator)])
            while len(left) >= size:
                if number >= begin:
                    yield self.rows(left[:size], names)
                left, number = left[size:], number + 1
            epoch += 1
