"""The tensors of models by name: read, checked against each other, averaged, and put into a model for a while."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from surgery.anatomy import input_embedding, output_head
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from surgery.checkpoint import Source

State = Mapping[str, Tensor]
ModelLike = nn.Module | State
"""A model in memory, or its state dict."""


def state_of(model: ModelLike | Source | str | Path) -> dict[str, Tensor]:
    """The tensors of a module, a state dict, a `Source` or a checkpoint on disk, by name; modules are not copied."""
    if isinstance(model, nn.Module):
        return dict(model.state_dict())
    if isinstance(model, Mapping):
        return dict(model)
    if isinstance(model, (str, Path)):
        from surgery.checkpoint import open_checkpoint

        model = open_checkpoint(model)
    return {name: model.read(name) for name in model.tensors}


def states_of(models: Sequence[ModelLike]) -> list[dict[str, Tensor]]:
    """The state dicts of `models`, checked: the same names and shapes, whole numbers equal, nothing NaN or infinite."""
    if not models:
        raise SurgeryError("There is no model to merge.")
    states = [state_of(model) for model in models]
    everywhere = set.intersection(*map(set, states))
    for state in states:  # a module lists its tied head, a checkpoint does not: it is no tensor of its own
        for name in tied(state).keys() - everywhere:
            del state[name]
    for i, state in enumerate(states[1:], 1):
        same_tensors(states[0], state, "model 0", f"model {i}")
    for name in states[0]:
        for i, state in enumerate(states):
            if state[name].is_floating_point() and not state[name].isfinite().all():
                raise SurgeryError(f"Tensor '{name}' of model {i} holds NaN or infinite numbers.")
    return states


def same_tensors(a: State, b: State, a_is: str, b_is: str) -> None:
    """Raises `SurgeryError` unless both have the same names and shapes, and equal whole numbers."""
    for name in {**a, **b}:
        if name not in a or name not in b:
            have, lacks = (a_is, b_is) if name in a else (b_is, a_is)
            raise SurgeryError(f"Tensor '{name}' is in {have}, but not in {lacks}.")
        if a[name].shape != b[name].shape:
            raise SurgeryError(
                f"Tensor '{name}' is {tuple(a[name].shape)} in {a_is}, but {tuple(b[name].shape)} in {b_is}."
            )
        if not a[name].is_floating_point() and not torch.equal(a[name], b[name]):
            raise SurgeryError(f"Tensor '{name}' holds whole numbers that differ between {a_is} and {b_is}.")


def shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """`count` weights that sum to 1, by default equal. Raises `SurgeryError` for negative ones or a sum of 0."""
    weights = [1.0] * count if weights is None else [float(w) for w in weights]
    if len(weights) != count:
        raise SurgeryError(f"{len(weights)} weights for {count} models.")
    if not all(math.isfinite(w) and w >= 0 for w in weights):
        raise SurgeryError(f"Weights must be finite and not negative: {weights}.")
    if not sum(weights):
        raise SurgeryError("The weights sum to 0.")
    return [w / sum(weights) for w in weights]


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32: what arithmetic on weights is done in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def average(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum w_i t_i, in the type and on the device of the first; whole numbers are those of the first."""
    first = tensors[0]
    if not first.is_floating_point():
        return first.clone()
    dtype = work_dtype(*tensors)
    mean = sum(w * t.detach().to(first.device, dtype) for w, t in zip(weights, tensors, strict=True))
    return torch.as_tensor(mean).to(first.dtype)


def aliases(states: Sequence[State]) -> dict[str, str]:
    """Tensors that are one with another in every state dict: {"lm_head.weight": "wte.weight"}.

    Looked for where some state dict has both in the same memory, and at the head: copies that were cast or moved tensor
    by tensor are still tied by value.
    """
    found = {name: to for state in states for name, to in tied(state).items()}
    head, embedding = output_head(states[0]), input_embedding(states[0])
    if head and embedding and (not found or found.get(embedding) == head):
        found.pop(embedding, None)  # the embedding is the one that a model's parameters list
        found[head] = embedding
    return {
        name: to
        for name, to in found.items()
        if all(s[name].shape == s[to].shape and s[name].equal(s[to]) for s in states)
    }


def tied(state: State) -> dict[str, str]:
    """Names of tensors that are the same memory as an earlier one: {name: the earlier name}."""
    first: dict[tuple, str] = {}
    found: dict[str, str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and first.setdefault(key, name) != name:
            found[name] = first[key]
    return found


@contextmanager
def loaded(model: nn.Module, state: State) -> Iterator[nn.Module]:
    """`model` with the weights of `state` inside the block, and with its own again afterwards, also after an exception.

        with loaded(model, merged) as m:
            score = accuracy(m, ...)

    Nothing is copied into the model's own weights: its parameters look at other memory for a while. Tensors that
    `state` lacks stay; raises `SurgeryError` for unknown names and other shapes.
    """
    own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    own |= {name: b for name, b in model.named_buffers(remove_duplicate=False) if name in state}
    first: dict[int, str] = {}
    for name, tensor in state.items():
        if name not in own:
            raise SurgeryError(f"The model has no tensor '{name}'.")
        expected, found = tuple(own[name].shape), tuple(tensor.shape)
        if expected != found:
            raise SurgeryError(f"Tensor '{name}' is {expected} in the model, but {found} in its new weights.")
        other = first.setdefault(id(own[name]), name)
        if not tensor.equal(state[other]):
            raise SurgeryError(f"The model has one tensor for '{other}' and '{name}', which its new weights untie.")
    before = {name: own[name].data for name in state}
    try:
        for name, tensor in state.items():
            own[name].data = tensor.detach().to(own[name].device, own[name].dtype)
        yield model
    finally:
        for name, data in before.items():
            own[name].data = data
