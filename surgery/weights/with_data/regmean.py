"""RegMean (Jin et al. 2023, arXiv:2212.09849): each linear layer keeps, in least squares, its parents' outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.registry import nearest
from surgery.weights.with_data.batches import Batch, evaluating, inputs_of, logits_of, mask_of
from surgery.weights.with_data.states import ModelLike, aliases, average, shares, states_of, work_dtype


class Grams(dict[str, Tensor]):
    """X^T X / n of the inputs of every linear layer, (in, in), by the name of the layer's weight.

    `transposed`: the weights stored (in, out) rather than (out, in), those of transformers' Conv1D in GPT-2. A square
    one can't be told by its shape.
    """

    def __init__(self, grams: Mapping[str, Tensor] | None = None, transposed: Iterable[str] = ()) -> None:
        super().__init__(grams or {})
        self.transposed = frozenset(transposed)


def input_grams(model: nn.Module, batches: Iterable[Batch]) -> Grams:
    """The mean of x x^T over all real tokens x that enter each linear layer (nn.Linear, transformers' Conv1D).

    Masked positions do not count. Sums are float32 (float64 for float64 models); n is the number of the data's tokens,
    so that models with more data do not win by it. A weight that is used in two places (a head tied to the embedding)
    has no Gram matrix. Memory: 4 in^2 bytes a layer. Raises `SurgeryError` for empty data, inputs that are not finite,
    and inputs whose positions the attention mask does not fit.
    """
    layers: dict[str, Any] = _linear_layers(model)
    if not layers:
        raise SurgeryError("The model has no linear layer of its own weight.")
    grams = Grams(transposed=(name for name, module in layers.items() if _is_conv1d(module)))
    tokens = 0
    mask: Tensor | None = None
    recent: list[tuple[Tensor, Tensor]] = []  # q, k and v read the same tensor: its Gram matrix is made once

    def collect(name: str) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = next(iter((*args, *kwargs.values())))
            if not recent or recent[0][0] is not x:
                recent[:] = [(x, _gram(name, x, mask))]
            gram = recent[0][1]
            grams[name] = grams[name] + gram if name in grams else gram

        return hook

    handles = [module.register_forward_pre_hook(collect(name), with_kwargs=True) for name, module in layers.items()]
    try:
        with torch.no_grad(), evaluating(model):
            for batch in batches:
                inputs = inputs_of(batch, model)
                mask = mask_of(inputs)
                recent.clear()
                tokens += _positions(inputs) if mask is None else int(mask.sum())
                logits_of(model, inputs)
    finally:
        recent.clear()
        for handle in handles:
            handle.remove()
    if not tokens:
        raise SurgeryError("There are no batches: the data is empty, or an iterator that has already been used up.")
    for name, module in layers.items():
        # No input ever came here (an expert that was not chosen): this model has no say in the layer.
        gram = grams.get(name)
        if gram is None:
            size = module.weight.shape[0 if name in grams.transposed else 1]
            gram = torch.zeros(size, size, dtype=work_dtype(module.weight), device=module.weight.device)
        if not gram.isfinite().all():
            raise SurgeryError(f"The inputs of '{name}' hold NaN or infinite numbers.")
        grams[name] = gram / tokens
    return grams


def regmean_merge(
    models: Sequence[ModelLike],
    grams: Sequence[Mapping[str, Tensor]],
    *,
    off_diagonal: float = 0.9,
    ridge: float = 1e-6,
    weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """W = (sum_i w_i W_i G_i) (sum_i w_i G_i)^-1 for each linear layer (section 3.2), W stored (out, in).

    This is the W that minimises sum_i w_i E ||W x_i - W_i x_i||^2. All other tensors are averaged.
    `off_diagonal` shrinks the Gram matrices towards their diagonals (the paper: 0.9; GPT-2 in FusionBench: 0.6; 1
    leaves them). `ridge`, in units of the mean of the diagonal, pulls towards the average: it decides directions that
    no input takes. Types are those of the first model. Raises `SurgeryError` for Gram matrices that do not fit the
    models, and for a singular sum with `ridge` 0.
    """
    states = states_of(models)
    w = shares(weights, len(states))
    if len(grams) != len(states):
        raise SurgeryError(f"{len(grams)} sets of Gram matrices for {len(states)} models.")
    if not 0 <= off_diagonal <= 1 or not 0 <= ridge < float("inf"):
        raise SurgeryError(f"off_diagonal must be in [0, 1] and ridge >= 0, not {off_diagonal} and {ridge}.")
    for i, mine in enumerate(grams):
        if mine.keys() != grams[0].keys():
            name = sorted(mine.keys() ^ grams[0].keys())[0]
            raise SurgeryError(f"The Gram matrices 0 and {i} are not of the same layers: only one has '{name}'.")
    for name in grams[0]:
        if name not in states[0]:
            hint = nearest(name, states[0])
            raise SurgeryError(f"There is a Gram matrix for '{name}', no tensor of the models.", hint=hint)
    transposed = {name for gram in grams for name in getattr(gram, "transposed", ())}
    for model in models:
        if isinstance(model, nn.Module):
            transposed |= {name for name, module in _linear_layers(model).items() if _is_conv1d(module)}
    alias = aliases(states)
    merged: dict[str, Tensor] = {}
    for name in states[0]:
        tensors = [state[name] for state in states]
        if name in alias:
            continue
        if name not in grams[0]:
            merged[name] = average(tensors, w)
        else:
            oriented = [t.T if name in transposed else t for t in tensors]
            solved = _regress(name, oriented, [g[name] for g in grams], w, off_diagonal, ridge)
            merged[name] = (solved.T if name in transposed else solved).contiguous()
    return {name: merged[alias.get(name, name)] for name in states[0]}


def _regress(
    name: str, parents: Sequence[Tensor], grams: Sequence[Tensor], w: Sequence[float], off_diagonal: float, ridge: float
) -> Tensor:
    """The equation for one layer, in float64: what is added and inverted differs by orders of magnitude."""
    first, size = parents[0], parents[0].shape[-1]
    total = torch.zeros(size, size, dtype=torch.float64)
    wanted = torch.zeros(first.shape, dtype=torch.float64)
    mean = torch.zeros(first.shape, dtype=torch.float64)
    for i, (wi, matrix, gram) in enumerate(zip(w, parents, grams, strict=True)):
        if gram.shape != (size, size):
            raise SurgeryError(
                f"Gram matrix {i} of '{name}' is {tuple(gram.shape)}, but the layer reads {size} inputs.",
                hint="Weights stored (in, out) need the Gram matrices as `input_grams` returned them.",
            )
        if not gram.isfinite().all():
            raise SurgeryError(f"Gram matrix {i} of '{name}' holds NaN or infinite numbers.")
        g, m = gram.detach().cpu().double(), matrix.detach().cpu().double()
        g = wi * (off_diagonal * g + (1 - off_diagonal) * g.diag().diag())
        total, wanted, mean = total + g, wanted + m @ g, mean + wi * m
    pull = ridge * total.diag().mean()
    if ridge and not pull:
        return mean.to(first.device, first.dtype)
    total.diagonal().add_(pull)
    factor, failed = torch.linalg.cholesky_ex(total)
    if failed:
        raise SurgeryError(f"The summed Gram matrix of '{name}' is singular.", hint="Give a larger ridge or more data.")
    return torch.cholesky_solve((wanted + pull * mean).T, factor).T.to(first.device, first.dtype)


def _gram(name: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """x^T x over the real tokens of (..., in) inputs."""
    rows = x.flatten(0, -2)
    if mask is not None and not mask.all():
        if len(rows) == mask.numel():
            rows = rows[mask.flatten().to(rows.device)]
        elif len(rows) != len(mask):  # a layer that reads one vector an example, like a classifier's, has no padding
            raise SurgeryError(
                f"'{name}' reads {len(rows)} vectors, which the attention mask {tuple(mask.shape)} does not fit.",
                hint="Pass batches without padding (sequences of one length).",
            )
    rows = rows.to(work_dtype(rows))
    return rows.T @ rows


def _positions(inputs: Mapping[str, Any]) -> int:
    """Tokens of a batch without mask: those of `input_ids`, or the vectors of its first tensor."""
    if "input_ids" in inputs:
        return inputs["input_ids"].numel()
    first = next(v for v in inputs.values() if isinstance(v, Tensor))
    return first.numel() // max(1, first.shape[-1])


def _is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, a linear layer stored (in, out); told without importing transformers."""
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by the name of their weight, without weights that are used in two places."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {
        f"{name}.weight".lstrip("."): module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or _is_conv1d(module)) and uses[id(module.weight)] == 1
    }
