"""`CheckpointWriter`: a folder of safetensors written tensor by tensor, in any order, from any thread.

Names, shapes and types fix the header and every offset, so headers go first and rows follow by positioned writes.
Everything happens in a hidden folder beside the target, which is renamed when whole: under the final name there is
never half a model. A journal in the hidden folder lets a rerun of the same job take up where a killed one stopped.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from surgery.checkpoint.header import ITEM_BYTES, TensorInfo, encode_header, torch_dtype
from surgery.checkpoint.reader import INDEX, SINGLE
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from torch import Tensor

JOURNAL = "journal.jsonl"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(size: int | str) -> int:
    """Bytes of a size as users write it: `"5GB"`, `"300 MB"`, `"2GiB"` or a number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", str(size).strip().upper())
    if match is None or (found := int(float(match[1]) * UNITS.get(match[2], 0))) <= 0:
        raise SurgeryError(f"'{size}' is not a size.", hint="Write it like 5GB or 300MB.")
    return found


def shard(tensors: Iterable[TensorInfo], limit: int) -> list[list[TensorInfo]]:
    """Tensors, in their order, in shards of at most `limit` bytes (one tensor at least)."""
    shards: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in tensors:
        if shards[-1] and filled + info.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(info)
        filled += info.nbytes
    return shards


def check_target(out: Path, *, force: bool = False) -> None:
    """Raises `SurgeryError` when `out` exists without `force` to replace it, or when its parent can't hold it."""
    try:
        exists = os.path.lexists(out)
        parent = out.absolute().parent
        while not parent.exists():
            parent = parent.parent
    except OSError as error:
        raise SurgeryError(f"{str(out)[:200]} can't be written: {error.strerror}.") from error
    if exists and not force:
        raise SurgeryError(f"{out} exists already.", hint="Choose another name, or pass --force to replace it.")
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise SurgeryError(f"{parent} can't be written to.", hint="Choose another place for the output.")


class CheckpointWriter:
    """Writes `tensors` into the folder `out`: a context manager, whole at its end or not there at all.

    ```python
    with CheckpointWriter("merged", infos, job=digest) as writer:
        writer.write("lm_head.weight", rows, start=0)
    ```

    `job` names the work: an unfinished folder of the same job is taken up again, and `writer.done` maps the tensors
    it holds already to their notes; without it every run starts clean. `force` replaces an existing `out`. Raises
    `SurgeryError` when `out` exists, can't be written, or the disk is too small.
    """

    def __init__(
        self,
        out: str | Path,
        tensors: Iterable[TensorInfo],
        *,
        shard_size: int | str = "5GB",
        metadata: dict[str, str] | None = None,
        job: str | None = None,
        force: bool = False,
    ) -> None:
        self.out = Path(out).expanduser().absolute()
        self.tensors = {info.name: info for info in tensors}
        self.folder = self.out.parent / f".{self.out.name}.partial"
        self.done: dict[str, Any] = {}
        self._force, self._job = force, job
        self._rows_left = {info.name: info.rows for info in self.tensors.values()}
        self._shards = shard(self.tensors.values(), parse_size(shard_size))
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        self._place: dict[str, tuple[str, int]] = {}
        self._headers: dict[str, tuple[bytes, int]] = {}
        for file, infos in zip(names, self._shards, strict=True):
            header, offsets = encode_header(infos, metadata)
            self._headers[file] = header, len(header) + sum(info.nbytes for info in infos)
            self._place |= {name: (file, offset) for name, offset in offsets.items()}
        headers = hashlib.sha256(b"".join(header for header, _ in self._headers.values())).hexdigest()
        self._identity = {"job": job, "headers": headers}
        self._fds: dict[str, int] = {}
        self._journal: TextIO | None = None
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files together."""
        return sum(size for _, size in self._headers.values())

    def __enter__(self) -> CheckpointWriter:
        check_target(self.out, force=self._force)
        with self._told():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._guard = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR)
            try:
                fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(self._guard)
                raise SurgeryError(f"Another run is writing {self.out}.", hint="Wait for it, or stop it.") from None
        try:
            self._begin()
        except BaseException:
            self._close()
            raise
        return self

    def _begin(self) -> None:
        """Lays out the files, or takes up those of an unfinished run."""
        with self._told():
            self._resume()
            missing = self.nbytes - sum(self._size(file) for file in self._headers)
            free = shutil.disk_usage(self.folder).free
            if missing > free:
                self._discard()
                raise SurgeryError(
                    f"{self.out} needs {missing / 1e9:.2f} GB, and only {free / 1e9:.2f} GB are free there.",
                    hint="Make room, choose another place, or write a smaller type (--dtype bfloat16).",
                )
            for file, (header, size) in self._headers.items():
                fd = self._fds[file] = os.open(self.folder / file, os.O_CREAT | os.O_RDWR, 0o644)
                if not self.done:
                    os.ftruncate(fd, size)
                    os.pwrite(fd, header, 0)
            self._journal = open(self.folder / JOURNAL, "a", encoding="utf-8")  # noqa: SIM115 (closed in _close)
            if not self.done:
                self._note(self._identity)

    def write(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Writes `tensor`, rows of `name` from row `start` on, already in its declared type. Thread safe."""
        info = self.tensors[name]
        if tensor.dtype != torch_dtype(info.dtype):
            raise ValueError(f"{name}: {tensor.dtype} given, {info.dtype} declared")
        import torch

        flat = tensor.detach().cpu().contiguous().view(-1)
        if info.cols and flat.numel() % info.cols:
            raise ValueError(f"{name}: {flat.numel()} elements are not whole rows of {info.cols}")
        rows = flat.numel() // info.cols if info.cols else info.rows
        if start + rows > info.rows:
            raise ValueError(f"{name}: rows {start}:{start + rows} of {info.rows}")
        file, offset = self._place[name]
        if flat.numel():
            data = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
            self._pwrite(self._fds[file], data, offset + start * info.cols * ITEM_BYTES[info.dtype])
        with self._lock:
            self._rows_left[name] -= rows

    def finish(self, name: str, note: Any = None) -> None:
        """Says that `name` is whole; `note` (JSON) is kept in the journal and comes back in `done` after a resume."""
        with self._lock:
            self.done[name] = note
            self._note({"tensor": name, "note": note})

    def add_file(self, name: str, content: bytes | str | Path) -> None:
        """Puts a further file into the folder: bytes or text, or a copy of the file at a path."""
        with self._told():
            (self.folder / name).parent.mkdir(exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, self.folder / name)
            else:
                (self.folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with self._told():
                    self._complete()
            elif isinstance(error, SurgeryError) or self._job is None:
                self._discard()  # the input is at fault: there is nothing to take up again
        finally:
            self._close()

    def _close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}
        if self._journal is not None:
            self._journal.close()
        os.close(self._guard)

    def _complete(self) -> None:
        unfinished = [name for name, rows in self._rows_left.items() if rows > 0 and name not in self.done]
        if unfinished:
            raise ValueError(f"{len(unfinished)} tensors were not written, the first is {unfinished[0]}")
        if len(self._shards) > 1:
            weight_map = {name: file for name, (file, _) in sorted(self._place.items())}
            total = sum(info.nbytes for info in self.tensors.values())
            self.add_file(INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
        check_target(self.out, force=self._force)  # again: it may have appeared in the meantime
        (self.folder / JOURNAL).unlink()
        if os.path.lexists(self.out):
            old = self.out.parent / f".{self.out.name}.replaced"
            shutil.rmtree(old, ignore_errors=True)
            os.rename(self.out, old)
            os.rename(self.folder, self.out)
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        else:
            os.rename(self.folder, self.out)
        (self.out / "lock").unlink()  # last: until here nobody else may take the hidden folder for theirs

    def _resume(self) -> None:
        """Reads the journal of an unfinished run of the same job; anything else in the folder is removed."""
        try:
            text = (self.folder / JOURNAL).read_text(encoding="utf-8")
        except OSError:
            text = ""
        whole, _, torn = text.rpartition("\n")  # a kill may have torn the last line
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError:
            lines = []
        sizes_fit = all(self._size(file) == size for file, (_, size) in self._headers.items())
        if self._job is not None and lines and lines[0] == self._identity and sizes_fit:
            self.done = {line["tensor"]: line["note"] for line in lines[1:] if line["tensor"] in self.tensors}
            if torn:
                (self.folder / JOURNAL).write_text(whole + "\n", encoding="utf-8")
        if not self.done:
            for path in self.folder.iterdir():
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _note(self, line: dict[str, Any]) -> None:
        with self._told():
            assert self._journal is not None
            self._journal.write(json.dumps(line) + "\n")
            self._journal.flush()

    def _size(self, file: str) -> int:
        path = self.folder / file
        return path.stat().st_size if path.exists() else 0

    def _pwrite(self, fd: int, data: memoryview, offset: int) -> None:
        with self._told():
            while data:
                written = os.pwrite(fd, data, offset)
                data, offset = data[written:], offset + written

    def _discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turns the operating system's refusals into sentences."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._discard()
                raise SurgeryError(
                    f"The disk filled up while {self.out} was written; the unfinished output was removed.",
                    hint=f"{self.nbytes / 1e9:.2f} GB are needed.",
                ) from error
            raise SurgeryError(f"{self.out} can't be written: {error.strerror}.") from error
