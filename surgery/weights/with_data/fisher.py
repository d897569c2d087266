"""Fisher merging (Matena & Raffel 2022, arXiv:2111.09832): parameters weighted by how much predictions need them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.registry import nearest
from surgery.weights.with_data.batches import Batch, evaluating, examples_of, logits_of, predictions_of
from surgery.weights.with_data.states import ModelLike, aliases, average, shares, states_of, work_dtype

Labels = Literal["sampled", "given", "expected"]


@torch.inference_mode(False)
@torch.enable_grad()
def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    labels: Labels = "sampled",
    examples: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """F = E_x E_{y ~ p(y|x)} [(d log p(y|x) / d theta)^2] for every parameter, averaged over examples (section 3.2).

    Squared example by example: the square of a batch's gradient would be something else. The paper uses 256 to 2048.

    `labels`: "sampled" draws y from the model's own prediction, one draw an example; "expected" sums over all classes
    (a classifier's exact Fisher: one backward pass a class); "given" takes the data's labels (the empirical Fisher).
    A language model's y is drawn at each position that counts, given the text before it as it stands, so that F is the
    sum of the Fisher informations of these next-token predictions.
    `examples`: at most so many. Returns float32 tensors (float64 for float64 models) named as the model's parameters;
    a tied parameter has one. Raises `SurgeryError` for empty data and for gradients that are not finite.
    """
    if labels not in ("sampled", "given", "expected"):
        raise SurgeryError(f"Unknown labels '{labels}'.", hint=nearest(labels, ("sampled", "given", "expected")))
    generator = torch.Generator().manual_seed(seed)
    count = 0
    # Stand-ins that look at the same memory: neither .grad nor requires_grad of the model's own parameters is touched.
    with evaluating(model):
        theta = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
        fisher = {name: torch.zeros_like(p, dtype=work_dtype(p)) for name, p in theta.items()}
        for example in examples_of(batches, model, examples):
            for share, log_p in _log_likelihoods(logits_of(model, example, theta), example, labels, generator):
                gradients = torch.autograd.grad(log_p, list(theta.values()), retain_graph=True, allow_unused=True)
                for (name, total), g in zip(fisher.items(), gradients, strict=True):
                    if g is None:  # this example does not use the parameter
                        continue
                    if not g.isfinite().all():
                        raise SurgeryError(f"The gradient of '{name}' is not finite at example {count}.")
                    total.addcmul_(g.to(total.dtype), g.to(total.dtype), value=share)
            count += 1
    return {name: total / count for name, total in fisher.items()}


def _log_likelihoods(
    logits: Tensor, example: Mapping[str, Any], labels: Labels, generator: torch.Generator
) -> list[tuple[float, Tensor]]:
    """Pairs of a probability and log p(y|x) as a scalar, whose squared gradients one example's Fisher sums."""
    predictions, given = predictions_of(logits, example, given=labels == "given")
    if not len(predictions):
        raise SurgeryError("An example has no prediction that counts: all its labels are -100.")
    log_p = predictions.log_softmax(-1)
    if labels == "expected":
        if logits.dim() == 3:
            raise SurgeryError("labels='expected' is for classifiers: a language model's answers can't all be tried.")
        return [(log_p[0, k].exp().item(), log_p[0, k]) for k in range(log_p.shape[-1])]
    if labels == "sampled":
        if not predictions.isfinite().all():
            raise SurgeryError("The model predicts NaN or infinite logits: no label can be drawn.")
        # Drawn on the CPU in float64: the same draws on every device.
        drawn = torch.multinomial(log_p.detach().double().cpu().exp(), 1, generator=generator)
        given = drawn[:, 0].to(log_p.device)
    assert given is not None
    return [(1.0, log_p.gather(-1, given.long()[:, None]).sum())]


def fisher_merge(
    models: Sequence[ModelLike],
    fishers: Sequence[Mapping[str, Tensor]],
    *,
    weights: Sequence[float] | None = None,
    floor: float = 1e-6,
    normalize: bool = True,
) -> dict[str, Tensor]:
    """theta = sum_i w_i F_i theta_i / sum_i w_i F_i (eq. 2), element by element, in the types of the first model.

    `normalize` divides each F_i by its root mean square over all tensors: between models the same as the authors' code,
    which divides by the norm, so that a model with larger gradients does not win everywhere. No F counts as less than
    `floor`, which is then in units of that mean; where no model cares, the result is thus the average.
    Tensors without a Fisher information (buffers, frozen parts) are averaged. Raises `SurgeryError` for names or shapes
    that do not fit, and for Fishers that are negative, not finite or zero everywhere.
    """
    states = states_of(models)
    if len(fishers) != len(states):
        raise SurgeryError(f"{len(fishers)} Fisher informations for {len(states)} models.")
    if not floor > 0:
        raise SurgeryError(f"floor must be above 0, not {floor}: it keeps the merge from dividing 0 by 0.")
    w = shares(weights, len(states))
    scales = [_scale(i, fisher, states[0], fishers[0]) for i, fisher in enumerate(fishers)]
    if not normalize:
        scales = [1.0] * len(scales)
    alias = aliases(states)
    merged: dict[str, Tensor] = {}
    for name, first in states[0].items():
        tensors = [state[name] for state in states]
        if name in alias:
            continue
        if name not in fishers[0]:
            merged[name] = average(tensors, w)
        else:
            dtype = work_dtype(*tensors)
            above, below = torch.zeros_like(first, dtype=dtype), torch.zeros_like(first, dtype=dtype)
            for wi, fisher, scale, tensor in zip(w, fishers, scales, tensors, strict=True):
                precision = wi * (fisher[name].to(first.device, dtype) / scale).clamp_min(floor)
                above += precision * tensor.detach().to(first.device, dtype)
                below += precision
            merged[name] = (above / below).to(first.dtype)
    return {name: merged[alias.get(name, name)] for name in states[0]}


def _scale(i: int, fisher: Mapping[str, Tensor], state: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> float:
    """The root mean square of a Fisher information over all its elements, after checking it against the model."""
    if fisher.keys() != first.keys():
        name = sorted(fisher.keys() ^ first.keys())[0]
        raise SurgeryError(f"The Fisher informations 0 and {i} are not of the same tensors: only one has '{name}'.")
    squares, numel = 0.0, 0
    for name, values in fisher.items():
        if name not in state:
            raise SurgeryError(f"Fisher information {i} has '{name}', no tensor of a model.", hint=nearest(name, state))
        if values.shape != state[name].shape:
            raise SurgeryError(
                f"Fisher information {i} of '{name}' is {tuple(values.shape)}, the tensor {tuple(state[name].shape)}."
            )
        if not values.isfinite().all() or (values < 0).any():
            raise SurgeryError(f"Fisher information {i} of '{name}' has elements that are negative or not finite.")
        squares += values.double().square().sum().item()
        numel += values.numel()
    if not squares:
        raise SurgeryError(f"Fisher information {i} is zero everywhere.", hint="Was it made on the right data?")
    return (squares / numel) ** 0.5
