"""Pickled checkpoints (`.bin`), read only when the user asks, and only as plain tensors (`weights_only=True`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.header import _TORCH_NAMES, TensorInfo
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from torch import Tensor


class PickledCheckpoint:
    """`.bin` files as a `Source`: each file is opened once, memory-mapped, and its tensors are views of the map."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        import torch

        self.path, self.config = path, config
        self._state: dict[str, Tensor] = {}
        for file in [path] if path.is_file() else sorted(path.glob("*.bin")):
            if file.name in {"training_args.bin", "optimizer.bin", "scheduler.bin"}:
                continue
            try:
                state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            except Exception as error:  # unpickling hostile or foreign files fails in many ways
                why = (str(error).splitlines() or [type(error).__name__])[0]
                raise SurgeryError(
                    f"{file} can't be read as plain tensors: {why}",
                    hint="Nothing in it was run. Save it as safetensors where you trust it.",
                ) from error
            state = state.get("state_dict", state) if isinstance(state, dict) else state
            if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
                raise SurgeryError(f"{file} is not a dictionary of tensors.")
            self._state |= {str(name): tensor for name, tensor in state.items()}
        codes = {getattr(torch, v): k for k, v in _TORCH_NAMES.items() if hasattr(torch, v)}
        for name, tensor in self._state.items():
            if tensor.dtype not in codes or tensor.layout != torch.strided:
                raise SurgeryError(
                    f"{path}: tensor '{name}' is {tensor.dtype}, {tensor.layout}; plain numbers are needed."
                )
        if not self._state:
            raise SurgeryError(f"{path} holds no tensors.")
        self.tensors = {n: TensorInfo(n, codes[t.dtype], tuple(t.shape)) for n, t in self._state.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start:stop` of dimension 0 of tensor `name`."""
        if name not in self._state:
            raise SurgeryError(f"{self.path} has no tensor '{name}'.")
        tensor = self._state[name].contiguous()
        return tensor if tensor.ndim == 0 else tensor[start:stop]
