"""What the formats share: folders that are read with suspicion, and written whole or not at all.

Headers and shapes are compared with the size of the file and with the config before a number is read. A tensor that no
one asked for is refused: it belongs to a newer format, and what it does is unknown.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgery.checkpoint import Source, TensorInfo, open_checkpoint
from surgery.checkpoint.header import FLOATS, ITEM_BYTES, dtype_code, encode_header, torch_dtype
from surgery.checkpoint.reader import _inside, read_json
from surgery.checkpoint.writer import check_target
from surgery.errors import SurgeryError
from surgery.registry import Registry
from surgery.sae.formats.parts import Parts

FORMATS: Registry[type[Format]] = Registry("dictionary format")
Files = dict[str, Mapping[str, Any]]
"""Files of a folder by name: JSON, or tensors for `.safetensors` and `.pt`."""


class Format:
    """How one package keeps a dictionary in a folder."""

    config: ClassVar[str]
    weights: ClassVar[tuple[str, ...]]
    """Names of the file of weights, one of which is there."""

    def finds(self, folder: Path) -> bool:
        """Whether the folder looks like this format."""
        return any((folder / name).is_file() for name in self.weights)

    def read(self, folder: Path, *, allow_pickle: bool) -> tuple[Parts, dict[str, Any]]:
        """The dictionary, and what the config says beside it. Raises `SurgeryError`."""
        raise NotImplementedError

    def write(self, parts: Parts, metadata: dict[str, Any], *, allow_pickle: bool) -> Files:
        """The files. Raises `SurgeryError` for what the format can't hold."""
        raise NotImplementedError


class Config:
    """A JSON object whose values are asked for by name and type; `rest` is what nobody asked for."""

    def __init__(self, values: dict[str, Any], where: Path) -> None:
        self.where, self.rest = where, dict(values)

    @classmethod
    def read(cls, folder: Path, name: str) -> Config:
        if not (folder / name).is_file():
            raise SurgeryError(f"{folder} has no {name}.", hint="The folder is not whole: fetch it again.")
        path = _inside(folder, name)
        return cls(read_json(path), folder / name)

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of a key, `default` where there is none or it is null. `float` admits whole numbers."""
        value = self.rest.pop(key, None)
        if value is None:
            return default
        fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or value is not True)
        if not fits or value is False and kind is not bool or (kind is float and not math.isfinite(value)):
            raise SurgeryError(f"{self.where}: {key} is {str(value)[:80]!r}; {kind.__name__} was expected.")
        return value

    def size(self, key: str, found: int) -> None:
        """Raises `SurgeryError` where the config names another size than the tensors have."""
        value = self.take(key, int)
        if value is not None and value != found:
            raise SurgeryError(f"{self.where} says {key} {value:,}, and the tensors have {found:,}.",
                               hint="The folder is of two dictionaries, or damaged.")  # fmt: skip


class Stored:
    """The tensors of a file, asked for by name and shape."""

    def __init__(self, folder: Path, name: str, *, allow_pickle: bool = False) -> None:
        self.file = _inside(folder, name) if (folder / name).is_file() else folder / name
        if not self.file.is_file():
            raise SurgeryError(f"{self.file} is missing.", hint="The folder is not whole: fetch it again.")
        self.source: Source = open_checkpoint(self.file, allow_pickle=allow_pickle)
        size = sum(info.nbytes for info in self.source.tensors.values())
        if size > self.file.stat().st_size:  # of a pickle, whose tensors can be larger than what is stored
            raise SurgeryError(f"{self.file} claims {size:,} bytes of tensors and has {self.file.stat().st_size:,}.",
                               hint="It is damaged, or a hostile file.")  # fmt: skip
        self.names = {name.removeprefix("_orig_mod."): name for name in self.source.tensors}
        self.left = set(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor of so many dimensions, none of which is 0."""
        info = self._info(name)
        if len(info.shape) != dimensions or 0 in info.shape:
            raise SurgeryError(f"{self.file}: tensor '{name}' has the shape {list(info.shape)}; "
                               f"{dimensions} dimensions were expected.")  # fmt: skip
        return info.shape

    def take(self, name: str, *shape: int, allow: str = "") -> Tensor:
        """A tensor of this shape in float32 or float64, a view of the file where it is stored so.

        Its numbers are finite, but for what `allow` names ("inf", "nan").
        """
        info = self._info(name)
        if info.shape != shape or not info.is_float:
            raise SurgeryError(
                f"{self.file}: tensor '{name}' is {info.dtype} {list(info.shape)}; numbers {list(shape)} were expected."
            )
        self.left.discard(name)
        found = self.source.read(self.names[name])
        found = found if found.dtype in (torch.float32, torch.float64) else found.float()
        if ("nan" not in allow and found.isnan().any()) or ("inf" not in allow and found.isinf().any()):
            raise SurgeryError(f"{self.file}: tensor '{name}' has numbers that are not finite.",
                               hint="Take the dictionary from before it broke, or fetch it again.")  # fmt: skip
        return found

    def scalar(self, name: str) -> float:
        """A tensor of one number."""
        info = self._info(name)
        if info.numel != 1 or info.dtype not in (*FLOATS, "I64", "I32"):
            raise SurgeryError(f"{self.file}: '{name}' is {info.dtype} {list(info.shape)}; one number was expected.")
        self.left.discard(name)
        found: float = self.source.read(self.names[name]).item()
        if math.isnan(found):
            raise SurgeryError(f"{self.file}: '{name}' is not a number.")
        return found

    def whole(self, name: str) -> int:
        """A tensor of one whole number."""
        found = self.scalar(name)
        if not math.isfinite(found) or found != int(found):
            raise SurgeryError(f"{self.file}: '{name}' is {found}; a whole number was expected.")
        return int(found)

    def integers(self, name: str, *shape: int) -> Tensor:
        """A tensor of whole numbers, int64."""
        info = self._info(name)
        if info.shape != shape or info.dtype not in ("I64", "I32"):
            raise SurgeryError(f"{self.file}: '{name}' is {info.dtype} {list(info.shape)}; whole numbers {list(shape)} "
                               "were expected.")  # fmt: skip
        self.left.discard(name)
        return self.source.read(self.names[name]).long()

    def finish(self) -> None:
        """Raises `SurgeryError` where there are tensors that nobody asked for."""
        if self.left:
            raise SurgeryError(f"{self.file} holds tensors that are unknown here: {', '.join(sorted(self.left)[:5])}.",
                               hint="It is of another kind than its config says, or of a newer format.")  # fmt: skip

    def _info(self, name: str) -> TensorInfo:
        if name not in self.names:
            raise SurgeryError(f"{self.file} has no tensor '{name}'.", hint="It is damaged, or of another kind.")
        return self.source.tensors[self.names[name]]


def thresholds(found: Tensor) -> Tensor:
    """At least 0: all formats take the ReLU first, so that below 0 it is 0 to them."""
    return found.clamp(min=0)


def refuse(what: str, package: str, hint: str | None = None) -> SurgeryError:
    """That a format has no place for something."""
    return SurgeryError(f"{package} has no {what}.", hint=hint or "Save it in another format.")


def write_folder(out: Path, files: Files, *, force: bool) -> None:
    """Writes files under a hidden name beside `out` and renames the folder when it is whole."""
    check_target(out, force=force)
    out = out.absolute()
    partial, old = (out.parent / f".{out.name}.{os.getpid()}.{what}" for what in ("partial", "replaced"))
    try:
        partial.mkdir(parents=True)
        for name, content in files.items():
            if name.endswith(".safetensors"):
                _write_tensors(partial / name, content)
            elif name.endswith(".pt"):
                torch.save({k: v.clone() for k, v in content.items()}, partial / name)
            else:
                (partial / name).write_text(_json(content) + "\n", encoding="utf-8")
        check_target(out, force=force)  # again: it may have appeared in the meantime
        if os.path.lexists(out):
            os.rename(out, old)
        os.rename(partial, out)
    except (OSError, RuntimeError) as error:  # torch.save tells of a full disk by a RuntimeError
        raise SurgeryError(f"{out} can't be written: {getattr(error, 'strerror', None) or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if old.is_symlink() or old.is_file():
            old.unlink()
        shutil.rmtree(old, ignore_errors=True)


def _json(content: Mapping[str, Any]) -> str:
    try:
        return json.dumps(content, indent=2, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise SurgeryError(f"The metadata can't be written as JSON: {error}.") from error


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    infos = [TensorInfo(n, dtype_code(str(t.dtype)), tuple(t.shape)) for n, t in plain.items()]
    infos.sort(key=lambda info: (-ITEM_BYTES[info.dtype], info.name))  # so that all begin at a multiple of their item
    header, _ = encode_header(infos)
    with open(path, "wb") as file:
        file.write(header)
        for info in infos:
            tensor = plain[info.name]
            assert tensor.dtype == torch_dtype(info.dtype)
            file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
