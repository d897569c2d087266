"""A task vector on disk: one safetensors file (a folder of shards when it is big) that says what it was taken from.

The tensors are what the form keeps (formats.py), called `tensor` or `tensor:part`. `__metadata__` holds, as strings or
JSON: `format_version`, `kind` ("task vector"), `form` and `options`, `definition` (the formula), `base` and `tuned`
(name, digests of tensor names, config and tokenizer), `checksums` (xxh3_128 of every touched tensor of the base),
`dtype_policy` and `tensors` (shape and what the form remembers of each).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from surgery.anatomy import output_head
from surgery.checkpoint import Checkpoint, CheckpointWriter, Source, TensorInfo, open_checkpoint, read_header
from surgery.checkpoint.adapter import tied_pair
from surgery.checkpoint.companions import companion_folder
from surgery.checkpoint.header import ITEM_BYTES, torch_dtype
from surgery.checkpoint.provenance import header_hash
from surgery.checkpoint.reader import SINGLE
from surgery.checkpoint.writer import check_target
from surgery.errors import SurgeryError
from surgery.registry import nearest
from surgery.weights.compressed import LowRankForm
from surgery.weights.expression import Difference, Expression
from surgery.weights.formats import FORMS, Delta, Form, Kept, Note
from surgery.weights.progress import Progress, Tally
from surgery.weights.sources import Anchor, View, config_digest, tokenizer_digest
from surgery.weights.streams import Workspace, in_parallel

VERSION = 1
EMPTY = ":nothing"
"""The one tensor of a file that would have none: a safetensors file without tensors is refused by most readers."""


@dataclass(frozen=True)
class Saved:
    """What `save` did: sizes in bytes, time in seconds; `notes` is what the form remembers of every tensor."""

    path: Path
    form: str
    nbytes: int
    numbers: int
    seconds: float
    notes: dict[str, Note] = field(repr=False)

    @property
    def bytes_per_number(self) -> float:
        return self.nbytes / max(1, self.numbers)


def save(
    expression: Expression,
    out: str | Path,
    form: str = "float32",
    *,
    threads: int = 2,
    shard_size: int | str = "5GB",
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Saved:
    """Writes a vector in two streamed passes: one for sizes and checksums, one for the numbers.

    `out` ending in `.safetensors` becomes one file, anything else a folder. `options` are those of the form;
    `progress` counts two bytes for a number in each pass. Raises `SurgeryError` when `out` exists, a number is not
    finite, or the form can't keep this vector.
    """
    began = time.perf_counter()
    kind = FORMS.lookup(form)
    try:
        chosen = kind(**options)
    except TypeError as error:
        raise SurgeryError(f"The form {form} does not take these options: {error}.") from None
    out = Path(out).expanduser()
    check_target(out, force=force)
    anchor = _anchor(expression)
    notes: dict[str, Note] = {}
    sums: dict[str, str] = {}
    sizes = {name: Delta(expression, name, shape).numel for name, shape in expression.shapes.items()}
    tally = Tally(progress, 4 * sum(sizes.values()))

    def measure(name: str, _: Workspace) -> None:
        delta = Delta(expression, name, expression.shapes[name])
        notes[name] = chosen.measure(delta)
        found = notes[name].pop("_checksum", None)
        if found is None and anchor is not None:
            found = anchor.checksum(name)
        if found is not None:
            sums[name] = found
        tally.add(name, 2 * sizes[name])

    names = list(sizes)
    largest_first = sorted(names, key=lambda n: -sizes[n])
    in_parallel(largest_first, measure, threads=threads)
    notes = {name: notes[name] for name in names}  # in the order of the tensors, not of the threads
    infos = [
        TensorInfo(_part_name(name, part), dtype, shape)
        for name, note in notes.items()
        for part, (dtype, shape) in chosen.layout(expression.shapes[name], note).items()
    ] or [TensorInfo(EMPTY, "U8", (1,))]
    infos.sort(key=lambda info: -ITEM_BYTES[info.dtype])  # every tensor then starts on a multiple of its item
    metadata = _metadata(expression, chosen, anchor, notes, {n: sums[n] for n in names if n in sums})
    single = out.suffix == ".safetensors"
    folder = out.parent / f".{out.name}.folder" if single else out
    with CheckpointWriter(
        folder, infos, metadata=metadata, force=force or single, shard_size=1 << 60 if single else shard_size
    ) as writer:
        for info in infos:
            if info.nbytes == 0 or info.name == EMPTY:
                writer.write(info.name, torch.zeros(info.shape, dtype=torch_dtype(info.dtype)))

        def encode(name: str, _: Workspace) -> None:
            delta = Delta(expression, name, expression.shapes[name])
            for part, row, rows in chosen.encode(delta, notes[name]):
                if rows.numel():
                    writer.write(_part_name(name, part), rows, row)
            tally.add(name, 2 * sizes[name])

        in_parallel(largest_first, encode, threads=threads)
    if single:
        os.replace(folder / SINGLE, out)
        folder.rmdir()
    return Saved(out, form, writer.nbytes, sum(sizes.values()), time.perf_counter() - began, notes)


def _part_name(name: str, part: str) -> str:
    return f"{name}:{part}" if part else name


def _anchor(expression: Expression) -> Anchor | None:
    """The one base of an expression; None when it has none. All bases are compared number by number."""
    anchors = expression.anchors()
    for other in anchors[1:]:
        for name in expression.shapes:
            mine, theirs = anchors[0].checksum(name), other.checksum(name)
            if mine is not None and theirs is not None and mine != theirs:
                raise SurgeryError(
                    f"{expression} mixes differences from two different bases: tensor '{name}' differs between "
                    f"{anchors[0].name} and {other.name}.",
                    hint="Take both from one base; if you mean it, in Python: a.unbound() + b.unbound().",
                )
    return anchors[0] if anchors else None


def _metadata(
    expression: Expression, form: Form, anchor: Anchor | None, notes: dict[str, Note], sums: dict[str, str]
) -> dict[str, str]:
    tensors = {
        name: {"shape": list(expression.shapes[name])} | {k: v for k, v in note.items() if not k.startswith("_")}
        for name, note in notes.items()
    }
    content: dict[str, Any] = {
        "kind": "task vector",
        "format_version": VERSION,
        "form": form.name,
        "options": form.options,
        "definition": str(expression),
        "base": None if anchor is None else identity(anchor.name, anchor.header, anchor.source, anchor.about),
        "tuned": None,
        "checksums": sums,
        "dtype_policy": "tuned - base in float32 (float64 if one of them is), rounded once on writing",
        "tensors": tensors,
    }
    if isinstance(expression, Difference):
        tuned = Anchor.of(expression.tuned)
        content["tuned"] = identity(tuned.name, tuned.header, tuned.source, {})
    return {k: v if isinstance(v, str) else json.dumps(v, separators=(",", ":")) for k, v in content.items()}


def identity(name: str, header: str, source: Source | None, about: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of a model: from `source`, or as it is known already (`about`)."""
    if source is None:
        return dict(about)
    return {
        "name": name,
        "header": header,
        "config": config_digest(source.config),
        "tokenizer": tokenizer_digest(companion_folder(source)),
    }


class VectorFile:
    """A stored vector, opened: headers only."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.source = open_checkpoint(self.path)
        assert isinstance(self.source, Checkpoint)
        file = next(iter(self.source.tensors.values())).file
        assert file is not None
        self.metadata = read_header(file).metadata
        if self.metadata.get("kind") != "task vector":
            raise SurgeryError(
                f"{self.path} is not a stored task vector.",
                hint="Extract one: `surgery vector extract BASE TUNED -o FILE`, in Python "
                "TaskVector.between(BASE, TUNED).save(FILE).",
            )
        try:
            version = json.loads(self.metadata["format_version"])
            options = json.loads(self.metadata["options"])
            self.base: dict[str, Any] | None = json.loads(self.metadata["base"])
            self.checksums: dict[str, str] = json.loads(self.metadata["checksums"])
            self.definition = self.metadata["definition"]
            entries = json.loads(self.metadata["tensors"])
            self.shapes = {name: tuple(map(int, entry["shape"])) for name, entry in entries.items()}
            self.notes: dict[str, Note] = entries
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise SurgeryError(f"{self.path} has broken metadata: {error!r}.", hint="Extract it again.") from None
        if version != VERSION:
            raise SurgeryError(f"{self.path} has format version {version}; this program reads {VERSION}.")
        form = self.metadata.get("form", "")
        if form not in FORMS:
            raise SurgeryError(f"{self.path} has the unknown form '{form}'.", hint=nearest(form, FORMS))
        try:
            self.form = FORMS[form](**options)
            layouts = {name: self.form.layout(shape, self.notes[name]) for name, shape in self.shapes.items()}
        except (KeyError, ValueError, TypeError) as error:
            raise SurgeryError(f"{self.path} has broken metadata: {error!r}.", hint="Extract it again.") from None
        for name, parts in layouts.items():
            for part, (dtype, shape) in parts.items():
                info = self.source.tensors.get(_part_name(name, part))
                if info is None or (info.dtype, info.shape) != (dtype, tuple(shape)):
                    found = "is missing" if info is None else f"is {info.dtype} {list(info.shape)}"
                    raise SurgeryError(
                        f"{self.path}: '{_part_name(name, part)}' {found}, expected {dtype} {list(shape)}.",
                        hint="The file is damaged: extract the vector again.",
                    )

    def part(self, name: str, part: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.source.read(_part_name(name, part), start, stop)


class Record(Protocol):
    """What a file says of the base that its vector was taken from."""

    @property
    def path(self) -> Path: ...
    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def base(self) -> Mapping[str, Any] | None: ...
    @property
    def checksums(self) -> Mapping[str, str]: ...
    @property
    def definition(self) -> str: ...


@dataclass(frozen=True, eq=False)
class Recorded(Expression):
    """A vector with a record of its base; `base` itself is needed where the tuned model is kept, not the difference.

    Every tensor of the base is held against its checksum in the record when it is first used, unless it is `trusted`:
    with other numbers the difference would be wrong, and nothing would show it.
    """

    file: Record
    base: Source | None = None
    trusted: bool = False
    _compared: set[str] = field(default_factory=set, repr=False)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:  # type: ignore[override]
        return self.file.shapes

    @property
    def sound(self) -> bool:
        return True  # it was looked at when it was written

    def bound(self, base: Source, *, trusted: bool = False) -> Recorded:
        """The same vector with its base at hand. Raises `SurgeryError` when that has other tensors than its own."""
        about = self.file.base
        if trusted or about is None:
            return replace(self, base=base, trusted=trusted, _compared=set())
        if about.get("header") != header_hash(getattr(base, "inner", base)):
            for name, shape in self.shapes.items():
                info = base.tensors.get(name)
                if info is not None and info.shape != shape:
                    raise self._foreign(base, f"tensor '{name}' is {list(info.shape)} there, {list(shape)} in it")
            raise self._foreign(base, "names, shapes or types of its tensors differ from those of the vector's base")
        pair, head = tied_pair(base), output_head(self.shapes)
        if pair is not None and head is not None:  # the tuned model got a head of its own
            base = View(base, {pair[1]}, {head: pair[0]})
        return replace(self, base=base, trusted=False, _compared=set())

    def _compare(self, name: str) -> None:
        """Holds one tensor of the base against its checksum, once, if the numbers depend on it."""
        if self.base is None or self.trusted or name in self._compared or self.exact(name) is None:
            return
        known = self.file.checksums.get(name)
        if known is not None and name in self.base.tensors and Anchor.of(self.base).checksum(name) != known:
            raise self._foreign(self.base, f"tensor '{name}' has other numbers there")
        self._compared.add(name)

    def _foreign(self, base: Source, why: str) -> SurgeryError:
        name = (self.file.base or {}).get("name")
        return SurgeryError(
            f"{base.path} is not the base of {self.file.path}, which was taken from {name}: {why}.",
            hint="Name the base that the vector was extracted from.",
        )

    def anchors(self) -> tuple[Anchor, ...]:
        about = self.file.base
        if about is None:
            return ()
        return (Anchor(str(about.get("name")), str(about.get("header")), self.file.checksums, self.base, about),)

    def key(self) -> Any:
        return self.file.path.absolute(), None if self.base is None else self.base.path

    def __str__(self) -> str:
        return self.file.definition


@dataclass(frozen=True, eq=False)
class Stored(Recorded):
    """A vector read from a file in one of the forms of formats.py."""

    file: VectorFile

    def kept(self, name: str) -> Kept:
        file = self.file
        return Kept(name, file.shapes[name], file.notes[name], partial(file.part, name), self.base)

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        self._compare(name)
        numbers = self.file.form.decode(self.kept(name), start, stop)
        if not bool(torch.isfinite(numbers.sum())):
            self.refuse(name, numbers)
        return numbers

    def exact(self, name: str) -> str | None:
        return self.file.notes[name]["dtype"] if self.file.form.name == "lossless" else None

    def restored(self, name: str, start: int, stop: int, base: Tensor) -> Tensor:
        self._compare(name)
        return self.file.form.restore(self.kept(name), start, stop, base)  # type: ignore[attr-defined]

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        form = self.file.form
        return form.factors(self.kept(name)) if isinstance(form, LowRankForm) else None
