"""`open_checkpoint`: a folder, a single file, `base+adapter` or a hub name, read lazily and never whole.

Opening reads headers only and checks them; `read` maps the file and hands out views of it. All tensors of all inputs
can thus be walked through in a few hundred MB, whatever the models' size.
"""

from __future__ import annotations

import json
import mmap
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from surgery.checkpoint.header import FLOATS, ITEM_BYTES, TensorInfo, read_header, torch_dtype
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_JSON_BYTES = 100_000_000
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # Python's mmap has no name for it yet


class Source(Protocol):
    """Anything that tensors are read from: a checkpoint, a checkpoint with an adapter, ...

    `config` is the parsed `config.json` (empty when there is none); `tensors` describes every tensor by name.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start:stop` of dimension 0 in the storage type; a view where possible: do not write into it."""
        ...


class Checkpoint:
    """Safetensors files as one lazy `Source`; made by `open_checkpoint`."""

    def __init__(self, path: Path, tensors: dict[str, TensorInfo], config: dict[str, Any]) -> None:
        self.path = path
        self.tensors = tensors
        self.config = config
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        parameters = sum(t.numel for t in self.tensors.values())
        return f"Checkpoint({str(self.path)!r}, {len(self.tensors)} tensors, {parameters:,} numbers)"

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start:stop` of dimension 0 of tensor `name`, a view of the mapped file; `SurgeryError` if unknown."""
        import torch

        info = self.info(name)
        item, cols = ITEM_BYTES[info.dtype], info.cols
        start, stop, _ = slice(start, stop).indices(info.rows)
        count = max(0, stop - start) * cols
        shape = (max(0, stop - start), *info.shape[1:]) if info.shape else ()
        dtype = torch_dtype(info.dtype)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        offset = info.offset + start * cols * item
        data: Any = self._map(info)
        if offset % item:  # an odd header length: copy, since tensors must start on a multiple of their item
            data, offset = bytearray(data[offset : offset + count * item]), 0
        return torch.frombuffer(data, dtype=dtype, count=count, offset=offset).view(shape)

    def raw(self, name: str) -> memoryview:
        """The bytes of tensor `name`, a view of the mapped file."""
        info = self.info(name)
        if info.nbytes == 0:
            return memoryview(b"")
        return memoryview(self._map(info))[info.offset : info.offset + info.nbytes]

    def info(self, name: str) -> TensorInfo:
        """What is known of tensor `name`. Raises `SurgeryError` for an unknown name."""
        try:
            return self.tensors[name]
        except KeyError:
            raise SurgeryError(f"{self.path} has no tensor '{name}'.") from None

    def _map(self, info: TensorInfo) -> mmap.mmap:
        assert info.file is not None
        with self._lock:
            if info.file not in self._maps:
                # Private: torch wants writable memory, and the file must never be written. Unreserved: otherwise
                # the system refuses files larger than its memory, though hardly any of it will ever be used.
                flags, writable = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                try:
                    with open(info.file, "rb") as file:
                        self._maps[info.file] = mmap.mmap(file.fileno(), 0, flags=flags, prot=writable)
                except OSError as error:
                    raise SurgeryError(f"{info.file} can't be read: {error.strerror}.") from error
            return self._maps[info.file]


def open_checkpoint(spec: str | Path, *, allow_pickle: bool = False, revision: str | None = None) -> Source:
    """Opens `spec`: a folder, a `.safetensors` file, `base+adapter`, or a hub name where there is a network.

    Headers are read and checked, tensors are not touched. `allow_pickle` admits `.bin` files (with torch's
    `weights_only=True`). Raises `SurgeryError` for whatever is not a whole, unquantised checkpoint.
    """
    if "+" in str(spec) and _existing(spec) is None:
        from surgery.checkpoint.adapter import AdaptedCheckpoint

        base, _, adapter = str(spec).rpartition("+")
        source = open_checkpoint(base, allow_pickle=allow_pickle, revision=revision)
        return AdaptedCheckpoint(source, locate(adapter), allow_pickle=allow_pickle)
    path = locate(spec, revision=revision)
    if path.is_file():
        return _open_file(path, allow_pickle)
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    _refuse_quantised(path, config)
    index, single = path / INDEX, path / SINGLE
    if index.is_file():
        tensors = _read_index(path, index)
    elif single.is_file():
        tensors = read_header(_inside(path, SINGLE)).tensors
    elif (path / "adapter_config.json").is_file():
        raise SurgeryError(f"{path} is a LoRA adapter, not a whole model.", hint=f"Name its base as well: BASE+{path}.")
    else:
        others = sorted(path.glob("*.safetensors"))
        if not others and sorted(path.glob("*.bin")):
            return _open_pickled(path, config, allow_pickle)
        if len(others) != 1:
            raise SurgeryError(
                f"{path} is not a checkpoint: it holds neither {SINGLE} nor {INDEX}.",
                hint="Give the folder that holds config.json and the weights.",
            )
        tensors = read_header(_inside(path, others[0].name)).tensors
    return _checked(Checkpoint(path, tensors, config))


def locate(spec: str | Path, *, revision: str | None = None) -> Path:
    """The local path of `spec`; a name like `org/model` that is no path is fetched from the hub (or its cache)."""
    if (path := _existing(spec)) is not None:
        return path
    name = str(spec)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise SurgeryError(
            f"There is no file or folder '{spec}'.",
            hint="Check the path (hub names are org/model; `surgery zoo list` shows what is at hand).",
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*"]
        offline = not hub_answers()
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=offline))
    except Exception as error:  # the hub client raises a dozen kinds, all of them meaning: not here
        raise SurgeryError(
            f"There is no folder '{spec}', and it can't be had from the hub ({type(error).__name__}).",
            hint="Check the spelling, or download it where there is a network and give the folder.",
        ) from error


def _existing(spec: str | Path) -> Path | None:
    """The path that `spec` names, or None when nothing is there (or nothing can be, by such a name)."""
    try:
        path = Path(spec).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None


def hub_answers() -> bool:
    """Whether a connection to the hub can be made: asked once, where the hub's client would retry for a minute."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE or getproxies().get("https"):
        return not HF_HUB_OFFLINE
    address = urlsplit(ENDPOINT)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`. Raises `SurgeryError` when it is not one, or larger than 100 MB."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise SurgeryError(f"{path} is larger than {MAX_JSON_BYTES:,} bytes.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SurgeryError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(value, dict):
        raise SurgeryError(f"{path} must hold a JSON object.")
    return value


def _inside(folder: Path, name: Any) -> Path:
    """`folder/name`, refused when it leaves the folder (the hub cache's own links to its blobs excepted)."""
    path = folder / str(name)
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise SurgeryError(f"{folder}: the index names the file {name!r}, outside the folder.", hint="Do not trust it.")
    try:
        real, home = path.resolve(), folder.resolve()
        there = real.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a zero byte
        raise SurgeryError(f"{folder}: there can be no file {name!r} ({error}).") from error
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        home = home.parent.parent
    if not real.is_relative_to(home):
        raise SurgeryError(f"{path} is a link to {real}, outside the folder.", hint="Copy the file into the folder.")
    if not there:
        raise SurgeryError(f"{path} is missing.", hint="The download is not complete: fetch the folder again.")
    return path


def _read_index(folder: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise SurgeryError(f"{index} has no weight_map.")
    files = dict.fromkeys(map(str, weight_map.values()))
    headers = {file: read_header(_inside(folder, file)).tensors for file in files}
    tensors = {}
    for name, file in weight_map.items():
        if name not in headers[str(file)]:
            raise SurgeryError(f"{index} places tensor '{name}' in {file}, which does not hold it.")
        tensors[name] = headers[str(file)][name]
    for file, header in headers.items():
        for name in header.keys() - tensors.keys():
            raise SurgeryError(f"{folder / file} holds tensor '{name}', which {index.name} does not list.")
    return tensors


def _open_file(path: Path, allow_pickle: bool) -> Source:
    if path.suffix == ".safetensors":
        return _checked(Checkpoint(path, read_header(path).tensors, {}))
    if path.suffix in {".bin", ".pt", ".pth", ".ckpt"}:
        return _open_pickled(path, {}, allow_pickle)
    raise SurgeryError(f"{path} is not a checkpoint.", hint="Give a folder or a .safetensors file.")


def _open_pickled(path: Path, config: dict[str, Any], allow_pickle: bool) -> Source:
    if not allow_pickle:
        raise SurgeryError(
            f"{path} holds pickled weights, which can run code when loaded.",
            hint="Pass --allow-pickle to read them with weights_only=True, and write safetensors from then on.",
        )
    from surgery.checkpoint.pickled import PickledCheckpoint

    return PickledCheckpoint(path, config)


def _refuse_quantised(path: Path, config: dict[str, Any]) -> None:
    quantisation = config.get("quantization_config")
    if quantisation:
        kind = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation
        raise SurgeryError(
            f"{path} is quantised ({kind}): its tensors are codes, not numbers that can be added.",
            hint="Use the unquantised checkpoint, or load it with transformers, `model.dequantize()` and save it.",
        )


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    """Refuses what has no tensors and 8-bit floats, which mean nothing without their scales."""
    if not checkpoint.tensors:
        raise SurgeryError(f"{checkpoint.path} holds no tensors.")
    for info in checkpoint.tensors.values():
        if info.dtype.startswith("F8") or info.dtype == "C64":
            raise SurgeryError(
                f"{checkpoint.path}: tensor '{info.name}' is {info.dtype}, which needs scales to be read.",
                hint=f"Use an unquantised checkpoint ({', '.join(FLOATS)}).",
            )
    return checkpoint
