"""What linear layers read, as covariances: streamed, so that no activations are kept."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.models import as_batch, untouched
from surgery.tuning.projections import projections


def covariances(model: nn.Module, batches: Iterable[Any], modules: Iterable[str] | None = None) -> dict[str, Tensor]:
    """(in, in) float32 sum x x^T / tokens of what each projection reads, by name; modules that read one tensor (q, k
    and v) share one matrix.

    `batches`: whatever `surgery.models.as_batch` takes, of any number of rows; where the mask is 0 nothing is counted.
    A matrix takes 12 bytes a number meanwhile: it is summed up in float64. The model is left as it was. Raises
    `SurgeryError` without batches, for activations that are not finite, and when a layer reads no (batch, pos, in).
    """
    chosen = projections(model, modules)
    reader = _Reader()
    accepts = _accepted(model)
    handles = []
    try:
        for name, module in chosen.items():
            handles.append(module.register_forward_pre_hook(reader.hook(name), with_kwargs=True))
        with untouched(model):
            for each in batches:
                batch = as_batch(each)
                inputs: dict[str, Any] = batch.inputs(model)
                reader.mask = batch.mask.to(inputs["input_ids"].device) if batch.padded else None
                more = {"use_cache": False, "logits_to_keep": 1}
                model(**inputs, **{name: value for name, value in more.items() if name in accepts})
                reader.check()
    finally:
        for handle in handles:
            handle.remove()
    return reader.means()


def _accepted(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


class _Reader:
    """Sums x x^T of every tensor once, whichever modules read it one after the other."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self._leaders: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}
        self._tokens: dict[str, int] = {}
        self._last: tuple[Tensor, str] | None = None

    def hook(self, name: str) -> Any:
        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._read(name, args[0] if args else next(iter(kwargs.values())))

        return read

    def _read(self, name: str, x: Tensor) -> None:
        same = self._last[1] if self._last is not None and self._last[0] is x else name
        leader = self._leaders.setdefault(name, same)
        self._calls[name] = self._calls.get(name, 0) + 1
        if leader == same != name:
            return
        if leader != name:
            raise _no_longer(name, leader)
        self._last = (x, name)
        rows = self._real(name, x.detach()).float()
        products = (rows.T @ rows).to(torch.float32 if rows.device.type == "mps" else torch.float64)
        self._sums[name] = self._sums[name].add_(products) if name in self._sums else products
        self._tokens[name] = self._tokens.get(name, 0) + len(rows)

    def _real(self, name: str, x: Tensor) -> Tensor:
        """(tokens, in) without padding."""
        if self.mask is None:
            return x.reshape(-1, x.shape[-1])
        if x.shape[:-1] == self.mask.shape:
            return x[self.mask]
        if x.shape[:-1] == (self.mask.numel(),):  # some families lay the rows end to end
            return x[self.mask.flatten()]
        raise SurgeryError(f"'{name}' reads {tuple(x.shape)} of a batch of {tuple(self.mask.shape)} tokens: which of "
                           "them are padding can't be told.", hint="Give rows of one length.")  # fmt: skip

    def check(self) -> None:
        """After a batch: whoever shared a tensor did so always."""
        self._last = None
        for name, leader in self._leaders.items():
            if self._calls[name] != self._calls[leader]:
                raise _no_longer(name, leader)

    def means(self) -> dict[str, Tensor]:
        if not self._sums:
            raise SurgeryError("No batches: nothing was read.", hint="Batches are used up once; pass a list.")
        found = {}
        for leader, total in self._sums.items():
            if not total.isfinite().all():
                raise SurgeryError(f"What '{leader}' reads holds NaN or infinite numbers.",
                                   hint="Look at the weights, or run the model in float32.")  # fmt: skip
            found[leader] = (total / max(1, self._tokens[leader])).float()
        return {name: found[leader] for name, leader in self._leaders.items()}


def _no_longer(name: str, leader: str) -> SurgeryError:
    return SurgeryError(f"'{name}' and '{leader}' read one tensor at first, and not later.",
                        hint="Take their covariances in two calls, with modules=.")  # fmt: skip
