"""Batches through a model: which positions count, and padding that changes nothing."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError

Batch = Tensor | Mapping[str, Any]
IGNORED = -100
"""The label of a position that does not count, as in transformers."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode inside (no dropout); every module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, training in modes:
            module.training = training


def inputs_of(batch: Batch, model: nn.Module) -> dict[str, Any]:
    """Keyword arguments for `model`, tensors on its device; a bare tensor is the first argument of `forward`."""
    accepts = inspect.signature(model.forward).parameters
    if isinstance(batch, Tensor):
        batch = {next(iter(accepts)): batch}
    if not isinstance(batch, Mapping):
        raise SurgeryError(f"A batch is a mapping of tensors or a tensor, not {type(batch).__name__}.")
    device = next(model.parameters()).device
    inputs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}
    # Tensors made under torch.inference_mode can't take part in a backward pass; their copies can.
    return {name: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for name, v in inputs.items()}


def size_of(inputs: Mapping[str, Any]) -> int:
    """Examples in a batch."""
    sizes = {len(v) for v in inputs.values() if isinstance(v, Tensor) and v.dim()}
    if len(sizes) != 1:
        raise SurgeryError(f"The tensors of a batch must agree on its number of examples: found {sorted(sizes)}.")
    return sizes.pop()


def examples_of(batches: Iterable[Batch], model: nn.Module, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The examples of `batches` one by one, as batches of one without their masked positions.

    Padding on either side, once cut away, can change neither positions nor gradients.
    """
    if limit is not None and limit < 1:
        raise SurgeryError(f"examples must be at least 1, not {limit}.")
    count = 0
    for batch in batches:
        inputs = inputs_of(batch, model)
        mask = mask_of(inputs)
        for i in range(size_of(inputs)):
            if limit is not None and count == limit:
                return
            one = {name: v[i : i + 1] if isinstance(v, Tensor) and v.dim() else v for name, v in inputs.items()}
            if mask is not None:
                keep = mask[i]
                if not keep.any():
                    raise SurgeryError(f"Example {count} has no token that its attention mask leaves.")
                for name, v in one.items():
                    if isinstance(v, Tensor) and v.shape[:2] == (1, len(keep)):
                        one[name] = v[:, keep]
            yield one
            count += 1
    if not count:
        raise SurgeryError("There are no batches: the data is empty, or an iterator that has already been used up.")


def mask_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """(batch, pos) True where a token is real, None when the batch has no attention mask."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return None
    if mask.dim() != 2:
        raise SurgeryError(f"attention_mask must be (batch, pos), not {tuple(mask.shape)}.")
    return mask.bool()


def logits_of(model: nn.Module, inputs: Mapping[str, Any], parameters: Mapping[str, Tensor] | None = None) -> Tensor:
    """The model's logits in float32 or float64, with `parameters` in place of its own where given.

    (batch, classes), or (batch, pos, vocabulary) from a language model; `labels` are not passed on. Positions are
    counted from the first real token, so that left padding does not move them.
    """
    accepts = inspect.signature(model.forward).parameters
    arguments = {name: v for name, v in inputs.items() if name != "labels"}
    mask = inputs.get("attention_mask")
    if mask is not None and "position_ids" in accepts:
        arguments.setdefault("position_ids", (mask.long().cumsum(1) - 1).clamp(min=0))
    if "use_cache" in accepts:
        arguments["use_cache"] = False
    if parameters is None:
        out = model(**arguments)
    else:
        out = torch.func.functional_call(model, dict(parameters), (), arguments)
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
        raise SurgeryError("The model gives no logits: expected an output with `.logits`, or a 2-D or 3-D tensor.")
    return logits if logits.dtype == torch.float64 else logits.float()


def predictions_of(logits: Tensor, inputs: Mapping[str, Any], *, given: bool = False) -> tuple[Tensor, Tensor | None]:
    """The predictions of a batch that count, (n, classes), and their `labels`, (n,), where there are any.

    A classifier predicts once an example. A language model predicts at each real token what comes next: with `labels`
    only the tokens whose label is not -100 count; without, every prediction counts, the one after the last token too.
    `given`: labels are wanted (a language model's own next tokens where there are none).
    """
    labels = inputs.get("labels")
    if logits.dim() == 2:
        if given and labels is None:
            raise SurgeryError("labels='given' needs `labels` in every batch.")
        return logits, labels
    mask = mask_of(inputs)
    if given and labels is None:
        labels = inputs.get("input_ids")
        if labels is None:
            raise SurgeryError("labels='given' needs `labels` or `input_ids` in every batch.")
        labels = labels if mask is None else labels.masked_fill(~mask, IGNORED)
    if labels is not None:
        counts = labels[:, 1:] != IGNORED
        return logits[:, :-1][counts], labels[:, 1:][counts]
    return (logits.flatten(0, 1) if mask is None else logits[mask]), None
