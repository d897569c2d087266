"""AdaMerging (Yang et al. 2024, arXiv:2310.02575): merging coefficients learnt on inputs without labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from surgery.anatomy import group_of, layer_of, stack_of
from surgery.errors import SurgeryError
from surgery.registry import nearest
from surgery.weights.with_data.batches import Batch, evaluating, inputs_of, logits_of, mask_of, predictions_of
from surgery.weights.with_data.states import ModelLike, aliases, states_of, tied, work_dtype

Per = Literal["task", "layer", "tensor"]
Positions = Literal["all", "last"]


class AdaMerging(NamedTuple):
    """What was learnt, and the model that it makes."""

    coefficients: dict[str, Tensor]
    """lambda, (tasks,), for each group of tensors: "all", or "model.layers.3", "embedding", ..., or tensor names."""
    state_dict: dict[str, Tensor]
    """base + sum_k lambda_k (tuned_k - base), in the base's types."""
    history: list[float]
    """Mean entropy (nats a prediction) before each step."""


@torch.inference_mode(False)
@torch.enable_grad()
def adamerging(
    base: nn.Module,
    tuned: Sequence[ModelLike],
    batches: Sequence[Batch] | Sequence[Sequence[Batch]],
    *,
    per: Per = "task",
    positions: Positions = "all",
    start: float | Sequence[float] = 0.3,
    lr: float = 1e-3,
    steps: int = 500,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    seed: int = 0,
) -> AdaMerging:
    """min over lambda of sum_k E_{x of task k} H(p(. | x; base + sum_k lambda_k d_k)) with Adam (sections 3.2, 3.3).

    `batches` is one list of batches, or one list a task: then each step sees one batch of every task. No label is read;
    labels of -100 only say which positions do not count.
    `per`: one coefficient a task, one a task and layer, or one a task and tensor (what the authors' code calls
    layer-wise). For a language model the entropy is that of the next token (our reading; the paper has classifiers) at
    all real positions or, for bare prompts whose own text is random, at the last. `bounds`: as in the authors' code
    coefficients stay in [0, 1]; None lets them go. `steps` 0 is task arithmetic with `start`. The same seed gives the
    same order of batches and the same result.
    Memory: 4 bytes a parameter for each task vector and three times more (merged weights, their gradient and its sum),
    besides the models and one batch's activations.
    Raises `SurgeryError` for empty data, models that do not fit, and entropies that are not finite.
    """
    for option, value, valid in (("per", per, ("task", "layer", "tensor")), ("positions", positions, ("all", "last"))):
        if value not in valid:
            raise SurgeryError(f"Unknown {option} '{value}'.", hint=nearest(value, valid))
    if not tuned:
        raise SurgeryError("There is no tuned model to merge.")
    if steps < 0 or not lr > 0:
        raise SurgeryError(f"steps must be at least 0 and lr above 0, not {steps} and {lr}.")
    origin, *others = states_of([base, *tuned])
    alias = aliases([origin, *others])
    for name, to in tied(origin).items():
        if name not in alias:
            raise SurgeryError(f"The base has one tensor for '{to}' and '{name}', which a tuned model unties.")
    names = [n for n, t in origin.items() if t.is_floating_point() and n not in alias]
    floats = {n: origin[n].detach().to(work_dtype(origin[n])) for n in names}
    deltas = {n: torch.stack([o[n].detach().to(floats[n]) - floats[n] for o in others]) for n in names}
    groups = {n: _group(n, per) for n in names}
    first = torch.as_tensor(start, dtype=torch.float32)
    if first.shape not in ((), (len(others),)):
        raise SurgeryError(f"start must be one number or {len(others)} of them, one a tuned model: {start}.")
    first = first.expand(len(others))
    coefficients = {g: first.clone().to(deltas[n].device).requires_grad_() for n, g in groups.items()}

    def merged() -> dict[str, Tensor]:
        return {
            n: floats[n] + torch.tensordot(coefficients[groups[n]].detach().to(d), d, dims=1) for n, d in deltas.items()
        }

    data = _data_sets(batches)
    orders = [_endless(len(d), torch.Generator().manual_seed(seed + i)) for i, d in enumerate(data)]
    optimizer = torch.optim.Adam(coefficients.values(), lr=lr)
    history: list[float] = []
    with evaluating(base):
        for step in range(steps):
            theta = {n: t.requires_grad_() for n, t in merged().items()}
            total = 0.0
            slopes = {n: torch.zeros_like(t) for n, t in theta.items()}
            for batch_list, order in zip(data, orders, strict=True):
                entropy = mean_entropy(base, batch_list[next(order)], theta, positions)
                if not entropy.isfinite():
                    raise SurgeryError(f"The entropy is not finite at step {step}.", hint="Is lr too large?")
                total += entropy.item()
                gradients = torch.autograd.grad(entropy, list(theta.values()), allow_unused=True)
                for n, g in zip(theta, gradients, strict=True):
                    if g is not None:
                        slopes[n] += g
            history.append(total / len(data))
            # The chain rule by hand: d H / d lambda_k = <d H / d theta, d_k>, so no task's graph outlives its batch.
            optimizer.zero_grad()
            for n, delta in deltas.items():
                slope = torch.mv(delta.flatten(1), slopes[n].flatten()).float()
                lam = coefficients[groups[n]]
                lam.grad = slope if lam.grad is None else lam.grad + slope
            optimizer.step()
            if bounds is not None:
                with torch.no_grad():
                    for lam in coefficients.values():
                        lam.clamp_(*bounds)
    result = {n: t.clone() for n, t in origin.items()}
    result |= {n: t.to(origin[n].dtype) for n, t in merged().items()}
    result |= {n: result[to] for n, to in alias.items()}
    return AdaMerging({g: lam.detach() for g, lam in coefficients.items()}, result, history)


def mean_entropy(
    model: nn.Module, batch: Batch, parameters: dict[str, Tensor] | None = None, positions: Positions = "all"
) -> Tensor:
    """Mean entropy, in nats, of the predictions of a batch that count; a scalar that gradients flow through."""
    inputs = inputs_of(batch, model)
    logits = logits_of(model, inputs, parameters)
    if positions == "last" and logits.dim() == 3:
        mask = mask_of(inputs)
        last = -1 if mask is None else (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        predictions = logits[torch.arange(len(logits), device=logits.device), last]
    else:
        predictions, _ = predictions_of(logits, inputs)
    if not len(predictions):
        raise SurgeryError("A batch has no prediction that counts: all its labels are -100.")
    log_p = predictions.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def _group(name: str, per: Per) -> str:
    if per != "layer":
        return "all" if per == "task" else name
    return group_of(name) if layer_of(name) is None else f"{stack_of(name)}.{layer_of(name)}"


def _data_sets(batches: Sequence[Any]) -> list[Sequence[Batch]]:
    """One list of batches a data set."""
    if not isinstance(batches, Sequence):
        raise SurgeryError(f"batches must be a list (they are read again and again), not {type(batches).__name__}.")
    nested = bool(batches) and all(isinstance(b, Sequence) for b in batches)
    data: list[Sequence[Batch]] = list(batches) if nested else [batches]
    if not all(len(d) for d in data):
        raise SurgeryError("There are no batches.")
    return data


def _endless(count: int, generator: torch.Generator) -> Iterator[int]:
    """0..count-1 in a new random order, again and again."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
