"""What the weight space asks of a source: numbers in flat ranges, who it is (`Anchor`), whether its head is tied."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from surgery.anatomy import output_head
from surgery.checkpoint import Source, TensorInfo
from surgery.checkpoint.adapter import tied_pair
from surgery.checkpoint.provenance import Checksum, header_hash
from surgery.errors import SurgeryError
from surgery.weights.streams import CHUNK

VOLATILE = ("transformers_version", "_name_or_path", "name_or_path", "torch_dtype", "dtype", "use_cache")
"""Keys of a config that say nothing about the model."""


def ranges(numel: int, step: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Flat ranges that cover `numel` numbers, in order; each but the last has `step` of them."""
    for start in range(0, numel, step):
        yield start, min(numel, start + step)


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(first row, flat start, flat stop) of blocks of whole rows, about `CHUNK` numbers each."""
    rows = shape[0] if shape else 1
    cols = math.prod(shape[1:])
    step = max(1, CHUNK // max(1, cols))
    for row in range(0, rows, step):
        yield row, row * cols, min(rows, row + step) * cols


def flat(source: Source, name: str, start: int, stop: int) -> Tensor:
    """Numbers `start:stop` of a tensor as a flat view in the storage type: do not write into it."""
    info = source.tensors[name]
    cols = max(1, info.cols)
    first, last = start // cols, -(-stop // cols)
    return source.read(name, first, last).reshape(-1)[start - first * cols : stop - first * cols]


@dataclass(frozen=True, eq=False)
class Anchor:
    """A base: `header` is a digest of its tensors' names and shapes; checksums are known or made from `source`."""

    name: str
    header: str
    known: Mapping[str, str] | None = field(default=None, repr=False)
    source: Source | None = field(default=None, repr=False)
    about: Mapping[str, Any] = field(default_factory=dict, repr=False)
    _made: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, source: Source) -> Anchor:
        return cls(label(source), header_hash(getattr(source, "inner", source)), None, source)

    def checksum(self, name: str) -> str | None:
        """The xxh3_128 of the tensor's stored bytes; None when the base is not known well enough."""
        if self.known is not None:
            return self.known.get(name)
        if self.source is None or name not in self.source.tensors:
            return None
        if name not in self._made:
            made = Checksum()
            for start, stop in ranges(self.source.tensors[name].numel, 4 * CHUNK):
                made.update(flat(self.source, name, start, stop))
            self._made[name] = made.hexdigest()
        return self._made[name]

    def differs(self, other: Anchor) -> bool:
        """Whether two bases are certainly not the same, as far as it is known without reading them."""
        if self.header != other.header:
            return True
        mine, others = (a.known if a.known is not None else a._made for a in (self, other))
        return any(mine[name] != others[name] for name in mine.keys() & others.keys())

    def _key(self) -> Any:
        path = None if self.source is None else self.source.path
        return self.header, path, None if self.known is None else tuple(self.known.items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Anchor) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def label(source: Source) -> str:
    """How a source is called in formulas: the last part of its path."""
    return Path(source.path).name or str(source.path)


def config_digest(config: dict[str, Any]) -> str:
    """A digest of `config.json` without what changes from save to save."""
    kept = {key: value for key, value in config.items() if key not in VOLATILE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]


def tokenizer_digest(folder: Path) -> str | None:
    """The SHA-256 of `tokenizer.json`, None where there is none."""
    path = Path(folder) / "tokenizer.json"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32] if path.is_file() else None


class View:
    """A source with some tensors hidden and some read from others: `aliases` maps a new name to the tensor read."""

    def __init__(self, source: Source, hidden: set[str], aliases: dict[str, str]) -> None:
        self.path, self.config, self.inner = source.path, source.config, source
        self._aliases = aliases
        self.tensors: dict[str, TensorInfo] = {n: i for n, i in source.tensors.items() if n not in hidden}
        self.tensors |= {new: replace(source.tensors[old], name=new) for new, old in aliases.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.inner.read(self._aliases.get(name, name), start, stop)


def same_heads(*sources: Source) -> list[Source]:
    """The sources with the head seen alike in all: without it where all tie it, as a matrix of its own otherwise.

    A head that is in the file of a model that ties it is not used by the model, so it is not looked at either.
    """
    tied = [tied_pair(source) for source in sources]
    if all(t is None for t in tied):
        return list(sources)
    own = {head for s, t in zip(sources, tied, strict=True) if t is None and (head := output_head(s.tensors))}
    views: list[Source] = []
    for source, pair in zip(sources, tied, strict=True):
        views.append(source if pair is None else View(source, {pair[1]}, dict.fromkeys(own, pair[0])))
    return views


def check_pair(base: Source, tuned: Source, missing: str) -> None:
    """Raises `SurgeryError` unless every tensor of one has its counterpart in the other (`missing="skip"`: if any)."""
    if missing not in ("error", "skip"):
        raise SurgeryError(f"missing is '{missing}'; it can be 'error' or 'skip'.")
    odd = sorted(base.tensors.keys() ^ tuned.tensors.keys())
    if not base.tensors.keys() & tuned.tensors.keys():
        raise SurgeryError(f"{base.path} and {tuned.path} have no tensor in common.")
    if odd and missing == "error":
        where = base.path if odd[0] in base.tensors else tuned.path
        raise SurgeryError(
            f"{len(odd)} tensors are in only one of {base.path} and {tuned.path}; '{odd[0]}' is only in {where}.",
            hint="To leave them out: --missing skip, in Python missing='skip'.",
        )
    common = [name for name in base.tensors if name in tuned.tensors]
    other = [n for n in common if base.tensors[n].shape != tuned.tensors[n].shape]
    if other:
        shapes = [f"'{n}' {list(base.tensors[n].shape)} and {list(tuned.tensors[n].shape)}" for n in other[:5]]
        raise SurgeryError(
            f"{len(other)} tensors have other shapes in {base.path} and {tuned.path}: {'; '.join(shapes)}.",
            hint="Models of different vocabularies have to be aligned first.",
        )
    for name in common:
        mine, theirs = base.tensors[name], tuned.tensors[name]
        if mine.is_float != theirs.is_float:
            raise SurgeryError(f"Tensor '{name}' is {mine.dtype} in {base.path} and {theirs.dtype} in {tuned.path}.")
        if not mine.is_float and not all(
            flat(base, name, a, b).equal(flat(tuned, name, a, b)) for a, b in ranges(mine.numel)
        ):
            raise SurgeryError(
                f"The integer tensor '{name}' differs between {base.path} and {tuned.path}; it can't be subtracted."
            )
