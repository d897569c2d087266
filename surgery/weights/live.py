"""Vectors in a model that is in memory: added in place, and taken out again bit for bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.checkpoint import TensorInfo
from surgery.checkpoint.header import dtype_code
from surgery.errors import SurgeryError
from surgery.weights.deltas.entries import storage_bits
from surgery.weights.expression import Expression
from surgery.weights.sources import ranges

_count = itertools.count(1)


class ModelSource:
    """A model in memory as a `Source`: parameters and buffers under the names of its state dict, tied ones once.

    The numbers are copied to the CPU as they are now: what is done to the model later does not reach them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.path = Path(f"{type(model).__name__}#{next(_count)}")
        config: Any = getattr(model, "config", None)
        self.config: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
        self._state: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                self._state[name] = tensor.detach().to("cpu", copy=True)
        self.tensors = {n: TensorInfo(n, dtype_code(str(t.dtype)), tuple(t.shape)) for n, t in self._state.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start:stop` of dimension 0, a view: do not write into it."""
        tensor = self._state[name]
        return tensor[start:stop] if tensor.ndim else tensor


@dataclass
class _Saved:
    """What a range of a tensor was before: all its numbers, or (`places`) those that were changed."""

    tensor: Tensor
    start: int
    stop: int
    places: Tensor | None
    numbers: Tensor


class Undo:
    """Calling it puts back every bit that `apply_to` changed; a second call does nothing.

    It keeps the old values of the changed numbers, with their places where few changed: `nbytes` of memory beside the
    model. What was done to other numbers in the meantime stays.
    """

    def __init__(self) -> None:
        self._saved: list[_Saved] = []

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        kept = [t for s in self._saved for t in (s.places, s.numbers) if t is not None]
        return sum(t.numel() * t.element_size() for t in kept)

    def __repr__(self) -> str:
        return f"Undo({self.nbytes / 1e6:.1f} MB held)"

    @torch.no_grad()
    def __call__(self) -> None:
        while self._saved:
            saved = self._saved.pop()
            target = saved.tensor.view(-1)[saved.start : saved.stop]
            if saved.places is None:
                target.copy_(saved.numbers)
            else:
                target[saved.places.long()] = saved.numbers

    def put(self, tensor: Tensor, places: Tensor | None, old: Tensor, new: Tensor) -> None:
        """Writes `new` into `tensor` at flat `places` (None: all) and keeps `old`, which is what was there."""
        self._saved.append(_Saved(tensor, 0, tensor.numel(), places, old))
        if places is None:
            tensor.view(-1).copy_(new)
        else:
            tensor.view(-1)[places.long().to(tensor.device)] = new

    def _keep(self, tensor: Tensor, start: int, stop: int, old: Tensor, new: Tensor) -> None:
        places = (storage_bits(old) != storage_bits(new)).nonzero().view(-1)
        if places.numel() * (4 + old.element_size()) < old.numel() * old.element_size():
            if places.numel():
                self._saved.append(_Saved(tensor, start, stop, places.int(), old[places]))
        else:
            self._saved.append(_Saved(tensor, start, stop, None, old.clone()))


@torch.no_grad()
def apply_to(expression: Expression, model: nn.Module, scale: float = 1.0) -> Undo:
    """Adds scale * expression to `model` in place, tensor by tensor in pieces: float32, rounded once to its type.

    Tied parameters are changed once. Returns the `Undo`. After an exception the model is as before. Raises
    `SurgeryError` for tensors that the model lacks or has in another shape, and where it ties what the vector moves
    apart.
    """
    if not math.isfinite(scale):
        raise SurgeryError(f"The scale is {scale}; a finite number is needed.")
    undo = Undo()
    try:
        for name, tensor in targets(expression, model):
            _add(expression, name, tensor, scale, undo)
    except BaseException:
        undo()
        raise
    return undo


def _add(expression: Expression, name: str, tensor: Tensor, scale: float, undo: Undo) -> None:
    work = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    flat = tensor.view(-1)
    for start, stop in ranges(tensor.numel()):
        old = flat[start:stop]
        delta = expression.flat(name, start, stop).to(tensor.device, work)
        new = delta.mul_(scale).add_(old.to(work)).to(tensor.dtype)
        if not bool(torch.isfinite(new.sum(dtype=work))) and not bool(torch.isfinite(new).all()):
            raise SurgeryError(f"Adding {expression} gives values in '{name}' that are NaN or beyond {tensor.dtype}.")
        undo._keep(tensor, start, stop, old, new)
        old.copy_(new)


def targets(expression: Expression, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the vector with the model's own tensor for it."""
    state = {name: t.detach() for name, t in model.state_dict(keep_vars=True).items()}
    prefix = str(getattr(model, "base_model_prefix", "") or "") + "."
    found: dict[str, Tensor] = {}
    owner: dict[int, str] = {}
    for name, shape in expression.shapes.items():
        known = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in state), None)
        if known is None:
            raise SurgeryError(
                f"The model {type(model).__name__} has no tensor '{name}'.",
                hint="The vector belongs to another architecture, or to another class of this one.",
            )
        tensor = state[known]
        if tuple(tensor.shape) != shape:
            raise SurgeryError(f"'{name}' is {list(tensor.shape)} in the model, {list(shape)} in {expression}.")
        if not tensor.is_floating_point():
            raise SurgeryError(f"'{name}' is {tensor.dtype} in the model: nothing can be added to it.")
        if not tensor.is_contiguous():
            raise SurgeryError(f"'{name}' does not lie in one piece in memory.", hint="Call .contiguous() on it first.")
        if tensor.numel() and tensor.data_ptr() in owner:
            raise SurgeryError(
                f"The model ties '{name}' to '{owner[tensor.data_ptr()]}', and the vector moves them apart.",
                hint="Untie them first, or leave one out: --without lm_head, in Python vector.without('lm_head').",
            )
        if tensor.numel():
            owner[tensor.data_ptr()] = name
        found[name] = tensor
    yield from found.items()
