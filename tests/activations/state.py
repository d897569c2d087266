"""What a model is, to compare before and after: `with unchanged(model): ...` fails with the names of what changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HOOKS = [name for name in vars(nn.Module()) if "_hooks" in name]
"""The tables of a module that hold hooks, also those for backward passes, state dicts and loading."""


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Tensors (which, what is in them, their flags and gradients), modules (which, their mode, hooks and whatever else
    they carry), settings, and the modes of torch itself, by name."""
    found: dict[str, Any] = {
        "torch.grad": torch.is_grad_enabled(),
        "torch.inference": torch.is_inference_mode_enabled(),
        "torch.function modes": torch._C._len_torch_function_stack(),
    }
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[f"{name}: tensor"] = (id(tensor), tensor.requires_grad, _bytes(tensor))
        found[f"{name}: grad"] = None if tensor.grad is None else (id(tensor.grad), _bytes(tensor.grad))
    for name, module in model.named_modules():
        found[f"{name}: module"] = (id(module), module.training, sorted(vars(module)))
        found[f"{name}: hooks"] = {table: [(k, id(h)) for k, h in vars(module)[table].items()] for table in HOOKS}
        if hasattr(config := getattr(module, "config", None), "to_dict"):
            attention = vars(config).get("_attn_implementation_internal")
            found[f"{name}: config"] = (id(config), repr(config.to_dict()), attention)
    return found


def _bytes(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha1(plain.numpy().tobytes()).hexdigest()


@contextmanager
def unchanged(*models: nn.Module) -> Iterator[None]:
    """Fails, naming what, when anything of the models is different afterwards; exceptions go on."""
    before = [fingerprint(model) for model in models]
    try:
        yield
    finally:
        for model, was in zip(models, before, strict=True):
            now = fingerprint(model)
            differ = [name for name in was.keys() | now.keys() if was.get(name) != now.get(name)]
            assert not differ, f"changed: {sorted(differ)}"


def disturbed(model: nn.Module) -> nn.Module:
    """The model in a state that few would think of: mixed modes, a frozen parameter, a gradient that waits, a hook of
    somebody else's, a cache that is off."""
    model.train()
    list(model.modules())[-1].eval()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[-1].grad = torch.ones_like(parameters[-1])
    next(model.children()).register_forward_hook(lambda *_: None)
    model.config.use_cache = False  # type: ignore[union-attr]
    return model
